"""Hand-offs between workers that have ranks in another network: real processes, TCP and UCX, every shard by itself.

P has 2 ranks and D has 3, each the first one here. What comes out is what one rank says, and what D has of a prompt's
KV is what P has of it, to the bit.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
from checkpoints import SHAPES, build
from namespaces import HOSTS, two_networks
from scripted_gateway import ScriptedGateway

from kvferry.bus.base import BusMessage, BusSettings
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import BusUser
from kvferry.bus.server import EmbeddedNats
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.runtime import SystemRuntime
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.beats import Heartbeat
from kvferry.wire.messages import Codecs
from kvferry.wire.record import WorkerRecord
from kvferry.wire.sampling import Sampling
from kvferry.wire.subjects import inbox_prefix, role_beats
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest

ROOT: Final = Path(__file__).parents[2]
KEY: Final = "5a" * 32
USER: Final = BusUser("test", "a password of the test")
RANK_PORTS: Final = {"prefill": 7801, "decode": 7802}
RANKS: Final = {"prefill": 2, "decode": 3}
GREEDY: Final = Sampling(temperature=0.0, max_tokens=12)
LENGTHS: Final = (1, 40, 190)
PATIENCE_S: Final = 90.0


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(1, 190, length).tolist()


def alone(checkpoint: Path, prompt: list[int]) -> list[int]:
    """What one rank says."""
    runner = TorchRunner(EngineSettings(checkpoint, dtype="float32", num_blocks=16, threads=1))
    table, tokens, chunk, start = np.arange(16, dtype=np.int32), list(prompt), list(prompt), 0
    for index in range(GREEDY.max_tokens):
        draw = Draw(GREEDY, 0, index, np.asarray(tokens, np.uint32), len(prompt))
        step = SequenceStep(0, np.asarray(chunk, np.uint32), start, table, draw)
        (token,) = runner.execute(StepPlan((step,))).tokens
        assert token is not None
        start += len(chunk)
        chunk = [token]
        tokens.append(token)
    runner.close()
    return tokens[len(prompt) :]


# -- in the first network: NATS, the leaders, and who asks them ----------------------------------------------


class Here:
    """What `ScriptedGateway` needs, over NATS."""

    def __init__(self, url: str) -> None:
        self.runtime = SystemRuntime()
        self.workers: list[WorkerRecord] = []
        self._url = url

    def bus(self, name: str, role: str) -> NatsBus:
        settings = BusSettings(self._url, name, inbox_prefix("dev", role), user=USER.name, password=USER.password)
        return NatsBus(settings, self.runtime)


@asynccontextmanager
async def leaders(url: str, checkpoint: str, transport: str) -> AsyncIterator[None]:
    """The first rank of each worker, its process; the others are told where it is."""
    environ = {
        **os.environ, "KVFERRY_NATS_URL": url, "KVFERRY_NATS_USER": USER.name, "KVFERRY_NATS_PASSWORD": USER.password,
        "KVFERRY_DATA_KEY": KEY, "KVFERRY_REMOTE_RANKS": "", "KVFERRY_LOG_FORMAT": "json",
    }  # fmt: skip
    del environ["KVFERRY_REMOTE_RANKS"]
    processes = []
    for role, ranks in RANKS.items():
        flags = {
            "model": checkpoint, "engine": "torch", "dtype": "float32", "num-blocks": "32", "transport": transport,
            "tensor-parallel-size": str(ranks), "remote-ranks": str(ranks - 1), "rank-port": str(RANK_PORTS[role]),
            "host": "0.0.0.0", "advertise-host": HOSTS[0], "ucx-net-devices": "eth0", "slot-kb": "64",
        }  # fmt: skip
        named = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
        command = (sys.executable, "-m", f"kvferry_{role}", *named, "--debug-digests")
        processes.append(await asyncio.create_subprocess_exec(*command, env=environ, stdout=sys.stderr))
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        codes = await asyncio.gather(*(process.wait() for process in processes))
    assert codes == [0, 0], f"the leaders ended with {codes}"


async def records(here: Here) -> dict[str, WorkerRecord]:
    """Of both workers, once they are ready."""
    found: dict[str, WorkerRecord] = {}
    both = asyncio.Event()
    codecs = Codecs()

    def hear(message: BusMessage) -> None:
        beat = codecs.beat.decode(message.payload)
        if isinstance(beat, Heartbeat) and beat.state == "ready":
            found[beat.record.role] = beat.record
            if len(found) == len(RANKS):
                both.set()

    bus = here.bus("looks", "gateway")
    await bus.start()
    for role in RANKS:
        await bus.subscribe(role_beats("dev", role), hear)
    async with asyncio.timeout(PATIENCE_S):
        await both.wait()
    await bus.close()
    return found


async def get(record: WorkerRecord, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{record.debug_port}{path}")
        return answer.raise_for_status()


async def ask(here: Here, gateway: ScriptedGateway, workers: dict[str, WorkerRecord], length: int) -> dict[str, Any]:
    """One request through both workers: its tokens, and how many of its slots are equal on both sides."""
    work = gateway.work(prompt_of(length), model=Path(workers["decode"].model).name, sampling=GREEDY)
    address = workers["prefill"].address
    for record, message in (
        (workers["prefill"], PrefillRequest(work)), (workers["decode"], DecodeRequest(work, address)),
    ):  # fmt: skip
        gateway.expect(work, record)  # type: ignore[arg-type]
        answer = await gateway.ask(record, message, PATIENCE_S)  # type: ignore[arg-type]
        assert isinstance(answer, Accepted), answer
    await gateway.until(lambda: work.stream_id in gateway.ends, limit=PATIENCE_S)
    assert gateway.ends[work.stream_id].reason == "length", gateway.ends[work.stream_id]
    ticket, sides = work.ticket.hex(), []
    for record in workers.values():
        while ticket not in (rows := (await get(record, "/debug/digests")).json()):
            await asyncio.sleep(0.05)
        sides.append(rows[ticket])
    equal = sum(sides[0][slot] == digest for slot, digest in sides[1].items())
    return {"tokens": gateway.text(work), "slots": len(sides[1]), "equal": equal}


async def main(checkpoint: str, transport: str) -> None:
    server = EmbeddedNats([USER])
    await server.start()
    here = Here(server.url)
    async with leaders(server.url, checkpoint, transport):
        workers = await records(here)
        here.workers += workers.values()
        gateway = ScriptedGateway(here, "gateway-0")  # type: ignore[arg-type]
        await gateway.start()
        answers = [await ask(here, gateway, workers, length) for length in LENGTHS]
        metrics = {role: (await get(record, "/metrics")).text for role, record in workers.items()}
        shards = {role: [list(heads) for heads in record.address.heads] for role, record in workers.items()}
        await gateway.stop()
    await server.stop()
    print(json.dumps({"answers": answers, "shards": shards, "metrics": metrics}))


# -- the test ------------------------------------------------------------------------------------------------


@contextmanager
def rank(host: tuple[str, ...], leader: int) -> Iterator[subprocess.Popen[str]]:
    """One more rank, in the other network."""
    command = (sys.executable, "-m", "kvferry.worker.remote_rank", "--leader", f"{HOSTS[0]}:{leader}")
    environ = {**os.environ, "KVFERRY_DATA_KEY": KEY, "OMP_NUM_THREADS": "1", "KVFERRY_UCX_NET_DEVICES": "eth0"}
    with subprocess.Popen([*host, *command], env=environ, text=True, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def metric(text: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
def test_shards_in_two_networks_hand_over_what_one_rank_computes(tmp_path: Path, transport: str) -> None:
    checkpoint = build(SHAPES[0], tmp_path / "checkpoint")
    wanted = [alone(checkpoint, prompt_of(length)) for length in LENGTHS]
    with ExitStack() as stack:
        here, there = stack.enter_context(two_networks(ROOT))
        elsewhere = [
            stack.enter_context(rank(there, RANK_PORTS[role]))
            for role, ranks in RANKS.items()
            for _ in range(ranks - 1)
        ]
        folders = (str(Path(__file__).parent), str(ROOT / "tests"))
        code = (
            f"import asyncio, sys; sys.path[:0] = {folders!r}; import test_remote_shards; "
            f"asyncio.run(test_remote_shards.main({str(checkpoint)!r}, {transport!r}))"
        )
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*here, sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=150, check=False
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])  # behind what is logged
        for process in elsewhere:  # each ends with its leader
            assert process.wait(30) == 0, process.stderr and process.stderr.read()
    assert found["shards"] == {"prefill": [[0, 1], [1, 3]], "decode": [[0, 1], [1, 2], [2, 3]]}
    for answer, tokens, length in zip(found["answers"], wanted, LENGTHS, strict=True):
        assert answer == {"tokens": tokens, "slots": length, "equal": length}
    token_bytes = 4 * 64 * 3 * 2 * json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    for role, direction in (("prefill", "sent"), ("decode", "received")):
        moved = metric(found["metrics"][role], f'kvferry_kv_bytes_total{{direction="{direction}"}}')
        assert moved == token_bytes * sum(LENGTHS)
    assert metric(found["metrics"]["decode"], 'kvferry_pull_total{outcome="received"}') == len(LENGTHS)
