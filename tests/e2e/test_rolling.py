"""A cluster whose every part is replaced under load: no request is refused, no stream is lost and none is wrong.

Three NATS nodes, where each role is a user of its own, two gateways, one prefill and two decode workers. Clients stream
all the while, each through the gateway whose turn it is. Only a gateway that is itself being replaced may turn a
request away, before it has begun: the client asks the other one, as a load balancer would. The engine is exact, so
every text must be the very one that was told before.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from books import HOST
from nats_cluster import NatsCluster, running_cluster
from stack import Stack

from kvferry.bus.rights import users_of
from kvferry.runtime import SystemRuntime
from kvferry_local.bench.endpoint import Endpoint, Refused
from kvferry_local.bench.stream import Stream, stream
from kvferry_local.credentials import ROLES, read_credentials, write_credentials

CLUSTER: Final = "rolling"
PATIENCE_S: Final = 150.0
PROMPTS: Final = ("The river", "One, two, three,", "Once upon a time")
NUM_TOKENS: Final = 60
NUM_CLIENTS: Final = 3
RETRY_S: Final = 0.05  # between two gateways, of which the first is being replaced


@dataclass
class Load:
    """Clients that ask without a pause."""

    ports: list[int]  # of the gateways
    expected: dict[str, str] = field(default_factory=dict)
    replaced: set[int] = field(default_factory=set)  # ports of gateways that are ending, or beginning
    num_whole: int = 0
    num_turned_away: int = 0  # by one of these
    wrong: list[str] = field(default_factory=list)
    _turn: int = 0
    _stopped: bool = False

    async def tell(self, prompt: str) -> str:
        """One answer. Raises for one that is not whole, and for a refusal that has no excuse."""
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self._turn += 1
                answer = Stream()
                port = self.ports[self._turn % len(self.ports)]
                was_replaced = port in self.replaced
                try:
                    await stream(Endpoint(HOST, port), "/v1/completions", body, into=answer)
                except (Refused, ConnectionError, asyncio.IncompleteReadError) as error:
                    # A process that ends resets what waits to be accepted.
                    turned_away = error.status == 503 if isinstance(error, Refused) else not answer.arrivals
                    if not (turned_away and (was_replaced or port in self.replaced)):
                        raise
                else:
                    assert answer.usage is not None
                    assert answer.usage["completion_tokens"] == NUM_TOKENS
                    return answer.text
                self.num_turned_away += 1
                await asyncio.sleep(RETRY_S)

    async def run(self) -> None:
        number = 0
        while not self._stopped:
            prompt = PROMPTS[number % len(PROMPTS)]
            number += 1
            try:
                text = await self.tell(prompt)
            except Exception as error:
                self.wrong.append(f"{prompt!r}: {error!r}")
                return
            if text == self.expected[prompt]:
                self.num_whole += 1
            else:
                self.wrong.append(f"{prompt!r}: {text!r}")

    def stop(self) -> None:
        self._stopped = True

    async def more(self) -> None:
        """Until so many more streams are whole that some began after now."""
        enough = self.num_whole + NUM_CLIENTS + 1
        async with asyncio.timeout(PATIENCE_S):
            while self.num_whole < enough and not self.wrong:
                await asyncio.sleep(0.02)
        assert self.wrong == []


@dataclass
class Rolling:
    nats: NatsCluster
    stack: Stack
    load: Load

    async def workers(self) -> dict[str, dict[str, Any]]:
        """As a gateway that answers sees them."""
        for port in self.load.ports:
            try:
                document = await Endpoint(HOST, port).get_json("/v1/cluster")
            except (OSError, asyncio.IncompleteReadError):
                continue
            return {row["name"]: row for row in document["workers"]}
        return {}

    async def restarted(self, name: str, pid: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = (await self.workers()).get(name)
                if found is not None and found["pid"] != pid and found["state"] == "ready":
                    return
                assert self.load.wrong == []
                await asyncio.sleep(0.05)

    async def replace_gateway(self, pid: int, port: int) -> None:
        """From its SIGTERM until its successor says that requests should come."""
        self.load.replaced.add(port)
        os.kill(pid, signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            while pid in self.gateways() or not await _is_ready(port):
                await asyncio.sleep(0.05)
        self.load.replaced.discard(port)

    def gateways(self) -> dict[int, int]:
        """Pids and ports of those that run."""
        commands = {pid: command.split() for pid, command in self.stack.processes().items()}
        return {
            pid: int(words[words.index("--port") + 1]) for pid, words in commands.items() if "kvferry_gateway" in words
        }


async def _is_ready(port: int) -> bool:
    try:
        await Endpoint(HOST, port).get("/ready")
    except (Refused, OSError, asyncio.IncompleteReadError):
        return False
    return True


@pytest.fixture
async def rolling(flags: tuple[str, ...], tmp_path: Path) -> AsyncIterator[Rolling]:
    secrets = tmp_path / "secrets"
    write_credentials(secrets, CLUSTER, SystemRuntime())
    logins = read_credentials(secrets, CLUSTER).logins
    users = users_of(CLUSTER, {role: logins[role].password.get_secret_value() for role in ROLES})
    async with running_cluster(users) as nats:
        where = ("--cluster", CLUSTER, "--nats-url", nats.urls, "--nats-credentials", str(secrets))
        shape = ("--prefill", "1", "--decode", "2", "--gateways", "2")
        stack = Stack(tmp_path, *flags, *where, *shape)
        try:
            await asyncio.to_thread(stack.start)
            load = Load([urlsplit(url).port or 0 for url in stack.facts.gateways])
            load.expected = {prompt: await load.tell(prompt) for prompt in PROMPTS}
            clients = [asyncio.create_task(load.run()) for _ in range(NUM_CLIENTS)]
            yield Rolling(nats, stack, load)
            load.stop()
            await asyncio.gather(*clients)
            assert load.wrong == []
            assert await asyncio.to_thread(stack.stop) == 0
            assert "Traceback" not in stack.log.read_text()
        finally:
            await asyncio.to_thread(stack.close)


@pytest.mark.timeout(600)
async def test_a_node_of_nats_is_killed_and_then_every_process_is_restarted_and_every_stream_is_whole(
    rolling: Rolling, record_property: Any
) -> None:
    load = rolling.load
    await load.more()
    # The node that all processes are on: they name it first.
    await rolling.nats.kill(0)
    await load.more()
    await rolling.nats.nodes[0].start()
    for name, row in sorted((await rolling.workers()).items()):
        os.kill(row["pid"], signal.SIGTERM)
        await rolling.restarted(name, row["pid"])
        await load.more()
    assert load.num_turned_away == 0
    gateways = rolling.gateways()
    assert sorted(gateways.values()) == sorted(load.ports)
    for pid, port in gateways.items():
        await rolling.replace_gateway(pid, port)
        await load.more()
    # The nodes that are left, one after the other: by now the processes are spread over them.
    for number in (1, 2):
        await rolling.nats.kill(number)
        await rolling.nats.nodes[number].start()
        await load.more()
    # All at once, as where there is one alone: a pause.
    for number in range(len(rolling.nats.nodes)):
        await rolling.nats.kill(number)
    await asyncio.gather(*(node.start() for node in rolling.nats.nodes))
    await load.more()
    # Each of the five, and `kvferry up`, has lost a node that it was on, and then all.
    assert rolling.stack.log.read_text().count("bus reconnected") >= 12
    record_property("streams", load.num_whole)
    record_property("turned_away", load.num_turned_away)
    assert len(await rolling.workers()) == 3
