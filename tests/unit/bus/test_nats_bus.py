"""What only a real NATS server can do to the bus: freeze, refuse, hang up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import pytest
from bus_probes import PATIENCE, Changes, Collector
from nats.aio.msg import Msg
from nats_server import NatsServer, running_nats

from kvferry.bus.base import BusSettings
from kvferry.bus.client import ReceivedMessage
from kvferry.bus.nats import NatsBus
from kvferry.bus.nats_link import NatsLink
from kvferry.bus.rights import BusUser
from kvferry.errors import BusUnavailable, SettingError
from kvferry.runtime import SystemRuntime

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with running_nats() as made:
        yield made


STALE = [bytes([value]) * (4 << 20) for value in range(12)]  # far more than sockets buffer


@asynccontextmanager
async def everything_that_reaches(server: NatsServer) -> AsyncIterator[Collector]:
    """A client that a freeze does not disconnect, since it asks for no sign of life."""
    settings, collector = server.settings("watcher"), Collector()

    async def collect(message: Msg) -> None:
        collector(ReceivedMessage(None, message.subject, message.data, ""))  # type: ignore[arg-type]

    client = await nats.connect(settings.url, user=settings.user, password=settings.password)
    await client.subscribe("news", cb=collect)
    await client.flush()
    yield collector
    await client.close()


async def test_a_frozen_server_is_noticed_and_what_it_did_not_take_is_never_replayed(server: NatsServer) -> None:
    async with everything_that_reaches(server) as collector:
        bus = NatsBus(server.settings("p"), SystemRuntime())
        changes = Changes(bus)
        await bus.start()
        server.freeze()
        frozen_at = time.monotonic()
        for payload in STALE:
            await bus.publish("news", payload)
            await asyncio.sleep(0.01)  # each goes as far as it can go
        await changes.until(False)
        assert time.monotonic() - frozen_at < 10.0
        server.thaw()
        await changes.until(True)
        await bus.publish("news", b"fresh")
        while b"fresh" not in collector.payloads:
            await collector.until(len(collector.messages) + 1)
        # What the kernel had taken arrives. Nothing else does.
        assert len(collector.messages) - 1 < len(STALE) // 2
        await bus.close()


async def test_negative_control_the_client_library_alone_does_replay_it(server: NatsServer) -> None:
    settings, back = server.settings("p"), asyncio.Event()

    async def reconnected() -> None:
        back.set()

    async with everything_that_reaches(server) as collector, asyncio.timeout(2 * PATIENCE):
        client = await nats.connect(
            settings.url,
            user=settings.user,
            password=settings.password,
            ping_interval=1,
            reconnect_time_wait=1,
            max_reconnect_attempts=-1,
            pending_size=-1,
            reconnected_cb=reconnected,
        )
        try:
            server.freeze()
            for payload in STALE:
                await client.publish("news", payload)
                await asyncio.sleep(0.01)
            while client.is_connected:
                await asyncio.sleep(0.05)
            server.thaw()
            await back.wait()
            await client.publish("news", b"fresh")
            while b"fresh" not in collector.payloads:
                await collector.until(len(collector.messages) + 1)
            assert len(collector.messages) - 1 > len(STALE) // 2
        finally:
            server.thaw()
            await client.close()


async def test_close_does_not_wait_for_a_frozen_server(server: NatsServer) -> None:
    before = asyncio.all_tasks()
    bus = NatsBus(server.settings("a"), SystemRuntime())
    await bus.start()
    server.freeze()
    for _ in range(8):
        await bus.publish("news", bytes(4 << 20))
    began = time.monotonic()
    await bus.close()
    assert time.monotonic() - began < 10.0
    assert asyncio.all_tasks() <= before
    server.thaw()


async def test_a_server_that_takes_nothing_more_makes_publish_fail_instead_of_filling_memory(
    server: NatsServer,
) -> None:
    bus = NatsBus(server.settings("a"), SystemRuntime())
    await bus.start()
    server.freeze()
    with pytest.raises(BusUnavailable, match="has not taken"):  # noqa: PT012 - the limit is reached in the loop
        for _ in range(30):
            await bus.publish("news", bytes(8 << 20))
            await asyncio.sleep(0)
    await bus.close()
    server.thaw()


async def test_a_first_connect_to_a_frozen_server_fails_in_bounded_time(server: NatsServer) -> None:
    server.freeze()
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="no answer in time"):
        await NatsBus(server.settings("a"), SystemRuntime()).start()
    assert time.monotonic() - began < 10.0
    server.thaw()


@pytest.mark.parametrize("change", [{"password": "wrong"}, {"user": "", "password": ""}], ids=["wrong", "none"])
async def test_bad_credentials_are_refused_and_not_repeated_in_the_error(
    server: NatsServer, change: dict[str, str]
) -> None:
    address = server.embedded.url.removeprefix("nats://")
    settings = server.settings("a", url=f"nats://someone:hidden@{address}", **change)
    with pytest.raises(BusUnavailable, match="Authorization Violation") as caught:
        await NatsBus(settings, SystemRuntime()).start()
    assert address in str(caught.value)
    for secret in ("hidden", "wrong", server.password):
        assert secret not in str(caught.value) + repr(settings).replace(settings.url, "")


class Impatient(SystemRuntime):
    """Waits as briefly as allowed between attempts to reconnect. Two waits from now one more has failed."""

    def __init__(self) -> None:
        super().__init__()
        self._waits_left = 2
        self._failed = asyncio.Event()

    def uniform(self) -> float:
        self._waits_left -= 1
        if self._waits_left <= 0:
            self._failed.set()
        return 0.0

    async def one_more_failure(self) -> None:
        self._waits_left = 2
        self._failed.clear()
        async with asyncio.timeout(PATIENCE):
            await self._failed.wait()


async def test_credentials_that_are_refused_for_a_while_do_not_end_the_reconnecting(server: NatsServer) -> None:
    runtime = Impatient()
    bus = NatsBus(server.settings("a"), runtime)
    await bus.start()
    changes = Changes(bus)
    right = server.embedded.users
    await server.kill()
    server.embedded.users = (BusUser(server.user, "changed"),)
    await server.restart()
    await runtime.one_more_failure()
    assert not bus.connected
    await server.kill()
    server.embedded.users = right
    await server.restart()
    await changes.until(True)
    assert (bus.counters.reconnects, changes.seen) == (1, [False, True])
    await bus.close()


async def test_a_missing_certificate_file_names_the_setting(server: NatsServer) -> None:
    with pytest.raises(SettingError, match="KVFERRY_NATS_TLS_CA"):
        await NatsBus(server.settings("a", tls_ca="/nowhere/ca.pem"), SystemRuntime()).start()


async def test_an_address_that_is_none_is_a_clear_error() -> None:
    for url in ("nats://", "nats://host:notaport", "://", "nats://127.0.0.1:1"):
        with pytest.raises(BusUnavailable, match="KVFERRY_NATS_URL"):
            await NatsBus(BusSettings(url, "a", "inbox"), SystemRuntime()).start()


async def test_of_several_servers_the_next_one_is_taken_when_one_is_down_or_goes(server: NatsServer) -> None:
    async with running_nats() as other:
        nobody = "nats://127.0.0.1:1"
        account = f"{server.user}:{server.password}"
        mine = server.embedded.url.replace("//", f"//{account}@")
        theirs = other.embedded.url.replace("//", f"//{other.user}:{other.password}@")
        settings = server.settings("several", url=f"{nobody}, {mine},{theirs}", user="", password="")
        bus = NatsBus(settings, SystemRuntime())
        changes = Changes(bus)
        await bus.start()
        await server.kill()
        await changes.until(False)
        await changes.until(True)
        assert bus.counters.reconnects == 1
        await bus.close()
    bus = NatsBus(server.settings("none", url=f"{nobody},{nobody}"), SystemRuntime())
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1"):
        await bus.start()
    await bus.close()


async def test_whoever_disposes_of_a_connection_that_is_being_closed_lives_on(server: NatsServer) -> None:
    """nats-py's own reconnect waits for the end of its transport, and its close cancels that very future."""
    reported: list[Exception] = []
    link = NatsLink(lambda link: None, reported.append)
    await link.connect(server.settings("p"), server.settings("p").url)

    async def lose_and_dispose() -> None:
        """As a bus whose echo finds the connection broken before it is told so."""
        await link.client._process_op_err(ConnectionResetError())
        await asyncio.sleep(0)  # the reconnect begins
        await link.dispose()

    disposing = asyncio.create_task(lose_and_dispose())
    await asyncio.wait((disposing,), timeout=PATIENCE)
    assert disposing.done()
    assert not disposing.cancelled(), "nobody has cancelled it"
    assert disposing.result() is None
    assert reported == []


async def test_an_idle_connection_costs_next_to_nothing(server: NatsServer) -> None:
    bus = NatsBus(server.settings("a"), SystemRuntime())
    await bus.start()
    await bus.subscribe("x", Collector())
    seconds = 4.0
    used = time.process_time()
    await asyncio.sleep(seconds)
    used = time.process_time() - used
    assert used / seconds < 0.005, "share of one core"
    assert used > 0, "the pings cost something"
    await bus.close()
