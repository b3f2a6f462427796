"""The contract of `kvferry.bus.base`, over NATS with a real server and over its in-memory twin."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import uvloop
from bus_probes import PATIENCE, Changes, Collector, Responder
from nats_server import running_nats

from kvferry.bus.base import Bus, BusMessage, BusSettings, InvalidSubject, PayloadTooLarge
from kvferry.bus.memory import MemoryBroker, MemoryBus
from kvferry.bus.nats import NatsBus
from kvferry.errors import BusTimeout, BusUnavailable, NoResponders, SettingError
from kvferry.runtime import SystemRuntime

MAX_PAYLOAD = 2 << 20


class Harness(ABC):
    """A server, and clients that are closed when the test ends."""

    def __init__(self) -> None:
        self._buses: list[Bus] = []

    def bus(self, name: str, *, max_pending: int = 1 << 16, **settings: Any) -> Bus:
        """A client that is not started yet."""
        made = self._make(name, max_pending, settings)
        self._buses.append(made)
        return made

    async def started(self, name: str, **options: Any) -> Bus:
        bus = self.bus(name, **options)
        await bus.start()
        return bus

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()

    @abstractmethod
    async def open(self, stack: AsyncExitStack) -> None: ...

    @abstractmethod
    def _make(self, name: str, max_pending: int, settings: dict[str, Any]) -> Bus: ...

    @abstractmethod
    async def stop_server(self) -> None: ...

    @abstractmethod
    async def restart_server(self) -> None: ...


class NatsHarness(Harness):
    async def open(self, stack: AsyncExitStack) -> None:
        self._server = await stack.enter_async_context(running_nats(max_payload=MAX_PAYLOAD))

    def _make(self, name: str, max_pending: int, settings: dict[str, Any]) -> Bus:
        return NatsBus(self._server.settings(name, **settings), SystemRuntime(), max_pending=max_pending)

    async def stop_server(self) -> None:
        await self._server.kill()

    async def restart_server(self) -> None:
        await self._server.restart()


class MemoryHarness(Harness):
    async def open(self, stack: AsyncExitStack) -> None:
        self._broker = MemoryBroker(SystemRuntime(), max_payload=MAX_PAYLOAD)

    def _make(self, name: str, max_pending: int, settings: dict[str, Any]) -> Bus:
        made = BusSettings("memory://", name, f"kvferry.test.inbox.{name}", **settings)
        return MemoryBus(self._broker, made, SystemRuntime(), max_pending=max_pending)

    async def stop_server(self) -> None:
        self._broker.stop()

    async def restart_server(self) -> None:
        self._broker.restart()


def other_tasks() -> set[asyncio.Task[Any]]:
    """All but this one and the reader of the server's log."""
    return {task for task in asyncio.all_tasks() - {asyncio.current_task()} if task.get_name() != "nats-server log"}


@asynccontextmanager
async def opened(made: Harness) -> AsyncIterator[Harness]:
    async with AsyncExitStack() as stack:
        await made.open(stack)
        before = other_tasks()
        yield made
        await made.close()
        assert other_tasks() <= before, "a bus left tasks behind"


@pytest.fixture(params=[NatsHarness, MemoryHarness], ids=["nats", "memory"])
async def harness(request: pytest.FixtureRequest, no_leaks: None) -> AsyncIterator[Harness]:
    async with opened(request.param()) as made:
        yield made


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


async def test_messages_of_one_publisher_arrive_in_order(harness: Harness) -> None:
    publisher, subscriber = await harness.started("p"), await harness.started("s")
    collector = Collector()
    await subscriber.subscribe("numbers", collector)
    sent = [number(value) for value in range(3000)]
    for payload in sent:
        await publisher.publish("numbers", payload)
    assert await collector.until(3000) == sent


async def test_wildcards_match_as_in_nats(harness: Harness) -> None:
    bus = await harness.started("a")
    one, rest, exact = Collector(), Collector(), Collector()
    await bus.subscribe("k.*.c", one)
    await bus.subscribe("k.b.>", rest)
    await bus.subscribe("k.b.c", exact)
    for subject in ("k.b.c", "k.x.c", "k.b.d.e", "k.b", "k.c", "other.b.c", "k.b.c"):
        await bus.publish(subject, subject.encode())
    await exact.until(2)
    await bus.publish("k.b.c", b"end")
    assert await one.until(4) == [b"k.b.c", b"k.x.c", b"k.b.c", b"end"]
    assert await rest.until(4) == [b"k.b.c", b"k.b.d.e", b"k.b.c", b"end"]
    assert await exact.until(3) == [b"k.b.c", b"k.b.c", b"end"]
    assert [message.subject for message in rest.messages] == ["k.b.c", "k.b.d.e", "k.b.c", "k.b.c"]


async def test_a_subscription_delivers_as_soon_as_subscribe_has_returned(harness: Harness) -> None:
    publisher, subscriber = await harness.started("p"), await harness.started("s")
    for round_number in range(20):
        collector = Collector()
        subscription = await subscriber.subscribe(f"at.once.{round_number}", collector)
        await publisher.publish(f"at.once.{round_number}", b"x")
        await collector.until(1)
        await subscription.close()


async def test_every_request_gets_its_own_answer(harness: Harness) -> None:
    asker, other = await harness.started("a"), await harness.started("b")
    await other.subscribe("echo", Responder())
    answers = await asyncio.gather(*(asker.request("echo", number(i), PATIENCE) for i in range(100)))
    assert answers == [b"re:" + number(i) for i in range(100)]


async def test_a_process_may_ask_itself(harness: Harness) -> None:
    bus = await harness.started("a")
    await bus.subscribe("echo", Responder())
    assert await bus.request("echo", b"x", PATIENCE) == b"re:x"


async def test_a_request_that_nobody_listens_to_fails_at_once(harness: Harness) -> None:
    bus = await harness.started("a")
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(NoResponders) as caught:
            await bus.request("nobody.there", b"x", timeout=10 * PATIENCE)
    assert caught.value.subject == "nobody.there"


async def test_a_silent_responder_is_a_timeout_and_its_late_answer_goes_nowhere(harness: Harness) -> None:
    bus = await harness.started("a")
    late = Responder(held=True)
    await bus.subscribe("late", late)
    await bus.subscribe("echo", Responder())
    with pytest.raises(BusTimeout) as caught:
        await bus.request("late", b"first", timeout=0.05)
    assert (caught.value.subject, caught.value.timeout) == ("late", 0.05)
    await late.release()
    assert await bus.request("echo", b"second", PATIENCE) == b"re:second"


async def test_responding_to_a_plain_message_does_nothing(harness: Harness) -> None:
    bus = await harness.started("a")
    responder = Responder()
    await bus.subscribe("plain", responder)
    await bus.publish("plain", b"x")
    await responder.asked.until(1)
    await responder.release()


async def test_a_cancelled_request_or_subscribe_leaves_the_bus_working(harness: Harness) -> None:
    bus = await harness.started("a")
    silent = Responder(held=True)
    await bus.subscribe("silent", silent)
    asking = asyncio.ensure_future(bus.request("silent", b"x", PATIENCE))
    subscribing = asyncio.ensure_future(bus.subscribe("never", Collector()))
    await silent.asked.until(1)
    for task in (asking, subscribing):
        task.cancel()
    await asyncio.gather(asking, subscribing, return_exceptions=True)
    await silent.release()
    await bus.subscribe("echo", Responder())
    assert await bus.request("echo", b"y", PATIENCE) == b"re:y"


async def test_a_closed_subscription_calls_no_handler_even_for_messages_that_wait(harness: Harness) -> None:
    bus = await harness.started("a")
    closed, after = Collector(), Collector()
    subscription = await bus.subscribe("closed", closed)
    await bus.subscribe("after", after)
    for value in range(5000):
        await bus.publish("closed", number(value))
    await closed.until(1)
    await subscription.close()
    handled = len(closed.messages)
    assert handled < 5000, "none was waiting, so this shows nothing"
    await bus.publish("closed", b"later")
    await bus.publish("after", b"")
    await after.until(1)
    assert len(closed.messages) == handled
    await subscription.close()


async def test_after_a_server_restart_everything_works_and_nothing_stale_is_replayed(harness: Harness) -> None:
    publisher, subscriber = await harness.started("p"), await harness.started("s")
    changes = [Changes(publisher), Changes(subscriber)]
    collector, closed_while_down = Collector(), Collector()
    await subscriber.subscribe("news", collector)
    await subscriber.subscribe("echo", Responder())
    doomed = await subscriber.subscribe("news", closed_while_down)
    await publisher.publish("news", b"before")
    await collector.until(1)

    await harness.stop_server()
    for change in changes:
        await change.until(False)
    with pytest.raises(BusUnavailable):
        await publisher.publish("news", b"stale")
    with pytest.raises(BusUnavailable):
        await publisher.request("echo", b"stale", PATIENCE)
    with pytest.raises(BusUnavailable):
        await publisher.subscribe("late", Collector())
    await doomed.close()

    await harness.restart_server()
    for change in changes:
        await change.until(True)
        assert change.seen == [False, True]
    assert await publisher.request("echo", b"x", PATIENCE) == b"re:x"
    await publisher.publish("news", b"after")
    assert await collector.until(2) == [b"before", b"after"]
    assert closed_while_down.payloads == [b"before"]
    assert (publisher.counters.reconnects, subscriber.counters.reconnects) == (1, 1)


async def test_a_lost_connection_fails_the_requests_that_wait(harness: Harness) -> None:
    bus = await harness.started("a")
    silent = Responder(held=True)
    await bus.subscribe("silent", silent)
    asking = asyncio.ensure_future(bus.request("silent", b"x", timeout=10 * PATIENCE))
    await silent.asked.until(1)
    await harness.stop_server()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(BusUnavailable):
            await asking
    with pytest.raises(BusUnavailable):
        await silent.release()


async def test_a_server_whose_max_payload_is_too_small_stops_the_start(harness: Harness) -> None:
    with pytest.raises(SettingError, match=f"max_payload: {MAX_PAYLOAD + 1}") as caught:
        await harness.started("a", min_payload=MAX_PAYLOAD + 1)
    assert caught.value.setting == "max_payload"
    bus = await harness.started("b", min_payload=MAX_PAYLOAD)
    assert bus.max_payload == MAX_PAYLOAD


async def test_an_oversize_message_is_refused_and_the_largest_is_taken(harness: Harness) -> None:
    bus = await harness.started("a")
    collector = Collector()
    await bus.subscribe("large", collector)
    with pytest.raises(PayloadTooLarge) as caught:
        await bus.publish("large", bytes(MAX_PAYLOAD + 1))
    assert (caught.value.size, caught.value.limit) == (MAX_PAYLOAD + 1, MAX_PAYLOAD)
    with pytest.raises(PayloadTooLarge):
        await bus.request("large", bytes(MAX_PAYLOAD + 1), PATIENCE)
    largest = random.Random(0).randbytes(MAX_PAYLOAD)
    await bus.publish("large", largest)
    assert await collector.until(1) == [largest]


async def test_any_bytes_pass_unharmed(harness: Harness) -> None:
    bus = await harness.started("a")
    collector = Collector()
    await bus.subscribe("garbage", collector)
    sent = [
        b"",
        b"\r\n",
        b"\r\nMSG garbage 1 5\r\nhello\r\n",
        b"-ERR 'Stale Connection'\r\n",
        bytes(range(256)) * 64,
        *(random.Random(seed).randbytes(seed * 97) for seed in range(1, 60)),
    ]
    for payload in sent:
        await bus.publish("garbage", payload)
    assert await collector.until(len(sent)) == sent


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0\r\n", "a..b", ".a", "a.", "a.*", "a.>", "x" * 2000])
async def test_a_subject_that_nats_would_not_take_is_refused(harness: Harness, subject: str) -> None:
    bus = await harness.started("a")
    with pytest.raises(InvalidSubject):
        await bus.publish(subject, b"x")
    with pytest.raises(InvalidSubject):
        await bus.request(subject, b"x", PATIENCE)
    assert bus.connected


@pytest.mark.parametrize("pattern", ["", "a b", "a.>.b", "a*", "a.b>", "a..b"])
async def test_a_pattern_that_nats_would_not_take_is_refused(harness: Harness, pattern: str) -> None:
    bus = await harness.started("a")
    with pytest.raises(InvalidSubject):
        await bus.subscribe(pattern, Collector())
    assert bus.connected


async def test_an_overfull_subscription_drops_and_counts_and_goes_on(harness: Harness) -> None:
    publisher, subscriber = await harness.started("p"), await harness.started("s", max_pending=8)
    collector, end = Collector(), Collector()
    await subscriber.subscribe("burst", collector)
    await subscriber.subscribe("end", end)
    for value in range(5000):
        await publisher.publish("burst", number(value))
    await publisher.publish("end", b"")
    await end.until(1)
    await publisher.publish("burst", b"after")
    await collector.until(1)
    while collector.payloads[-1] != b"after":
        await collector.until(len(collector.payloads) + 1)
    arrived = collector.payloads
    assert subscriber.counters.dropped > 0
    assert len(arrived) + subscriber.counters.dropped == 5001
    assert arrived[:-1] == sorted(arrived[:-1], key=lambda payload: int.from_bytes(payload, "little"))


async def test_a_handler_that_raises_is_counted_and_gets_the_next_message(harness: Harness) -> None:
    bus = await harness.started("a")
    collector = Collector()

    def handler(message: BusMessage) -> None:
        collector(message)
        raise ValueError("a fault of the handler")

    await bus.subscribe("faulty", handler)
    for value in range(5):
        await bus.publish("faulty", number(value))
    await collector.until(5)
    await bus.subscribe("echo", Responder())
    assert await bus.request("echo", b"x", PATIENCE) == b"re:x"
    assert bus.counters.handler_errors == 5


async def test_a_listener_that_raises_does_not_keep_the_bus_down(harness: Harness) -> None:
    bus = await harness.started("a")

    def listener(connected: bool) -> None:
        raise ValueError("a fault of the listener")

    bus.on_change(listener)
    changes = Changes(bus)
    await harness.stop_server()
    await changes.until(False)
    await harness.restart_server()
    await changes.until(True)
    assert bus.counters.handler_errors == 2


async def test_close_flushes_what_was_published_and_may_be_called_twice(harness: Harness) -> None:
    publisher, subscriber = await harness.started("p"), await harness.started("s")
    changes = Changes(publisher)
    collector = Collector()
    await subscriber.subscribe("last.words", collector)
    sent = [bytes([value]) * 50_000 for value in range(100)]
    for payload in sent:
        await publisher.publish("last.words", payload)
    await publisher.close()
    await publisher.close()
    assert await collector.until(100) == sent
    assert not publisher.connected
    assert changes.seen == [], "closing on purpose is no loss"
    with pytest.raises(BusUnavailable):
        await publisher.publish("last.words", b"more")


async def test_closing_while_the_server_is_down_leaves_nothing_behind(harness: Harness) -> None:
    before = other_tasks()
    bus = await harness.started("a")
    await bus.subscribe("x", Collector())
    changes = Changes(bus)
    await harness.stop_server()
    await changes.until(False)
    await bus.close()
    assert other_tasks() <= before


async def test_closing_in_the_turn_of_a_loss_leaves_nothing_behind(harness: Harness) -> None:
    before = other_tasks()
    bus = await harness.started("a")
    stopping = asyncio.create_task(harness.stop_server())
    async with asyncio.timeout(PATIENCE):
        while bus.connected:  # each turn, so that the bus's own task has not seen the loss either
            await asyncio.sleep(0)
    await bus.close()
    assert other_tasks() - {stopping} <= before
    await stopping


async def test_a_first_connect_without_a_server_fails_and_names_the_setting(harness: Harness) -> None:
    await harness.stop_server()
    before = other_tasks()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(BusUnavailable, match="KVFERRY_NATS_URL") as caught:
            await harness.started("a")
    assert "\n" not in str(caught.value)
    assert other_tasks() <= before


@pytest.mark.parametrize(
    "scenario",
    [
        test_messages_of_one_publisher_arrive_in_order,
        test_every_request_gets_its_own_answer,
        test_after_a_server_restart_everything_works_and_nothing_stale_is_replayed,
        test_an_overfull_subscription_drops_and_counts_and_goes_on,
        test_close_flushes_what_was_published_and_may_be_called_twice,
        test_closing_while_the_server_is_down_leaves_nothing_behind,
        test_a_first_connect_without_a_server_fails_and_names_the_setting,
    ],
    ids=lambda scenario: scenario.__name__.removeprefix("test_"),
)
def test_on_uvloop_too(scenario: Callable[[Harness], Awaitable[None]]) -> None:
    async def run() -> None:
        async with opened(NatsHarness()) as harness:
            await scenario(harness)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
