"""The contract of `kvferry.transport.base`, over UCX, TCP and the in-memory twin."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvloop
from transports import (
    PATIENCE,
    Backends,
    MemoryBackends,
    Messages,
    Pair,
    TcpBackends,
    UcxBackends,
    backends,
    ended,
    patiently,
)

from kvferry.errors import ConnectionClosed, CorruptFrame, HandshakeRefused, SettingError
from kvferry.transport.base import Connection
from kvferry.transport.pool import ConnectionPool
from kvferry.wire.flow import MAX_FLOW_BYTES

SLOT = (4 << 20) + 64
LARGE = 16 << 20  # so large that a transfer of several is still under way when the first has ended


@pytest.fixture(params=[UcxBackends, TcpBackends, MemoryBackends], ids=["ucx", "tcp", "memory"])
async def made(request: pytest.FixtureRequest, no_leaks: None) -> AsyncIterator[Backends]:
    async with backends(request.param) as opened:
        yield opened


async def carry(one: Connection, other: Connection, tag: int, frame: bytes) -> bytes:
    """Send a frame from one to the other, and return what came."""
    buffer = bytearray(len(frame))
    received = other.receive(tag, memoryview(buffer))
    sent = one.send(tag, memoryview(frame))
    await patiently(sent)
    return bytes(buffer[: await patiently(received)])


# Flow messages


async def test_flow_messages_arrive_in_order_in_both_directions(made: Backends) -> None:
    pair = await made.pair()
    at_far, at_near = Messages(pair.far), Messages(pair.near)
    sent = [b"%d" % i + bytes(i % 600) for i in range(500)]
    for message in sent:
        pair.near.send_message(message)
        pair.far.send_message(message[::-1])
    assert await at_far.take(len(sent)) == sent
    assert await at_near.take(len(sent)) == [message[::-1] for message in sent]


async def test_flow_messages_of_every_size_arrive_whole(made: Backends) -> None:
    pair = await made.pair()
    messages = Messages(pair.far)
    sent = [os.urandom(size) for size in (0, 1, 63, 64, 65, 4000, MAX_FLOW_BYTES)]
    for message in sent:
        pair.near.send_message(message)
    assert await messages.take(len(sent)) == sent
    with pytest.raises(ValueError, match="4097"):
        pair.near.send_message(bytes(MAX_FLOW_BYTES + 1))


async def test_messages_that_came_before_the_handler_are_delivered_first(made: Backends) -> None:
    pair = await made.pair()
    for i in range(5):
        pair.near.send_message(b"early %d" % i)
    assert await carry(pair.near, pair.far, 1, b"they have come now") == b"they have come now"
    messages = Messages(pair.far)
    pair.near.send_message(b"late")
    assert await messages.take(6) == [*(b"early %d" % i for i in range(5)), b"late"]


async def test_a_handler_that_raises_does_not_end_the_connection(made: Backends) -> None:
    pair = await made.pair()
    loop = asyncio.get_running_loop()
    reported: list[object] = []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

    def handler(message: memoryview) -> None:
        if message == b"bad":
            raise RuntimeError("the owner's fault")
        done.set_result(bytes(message))

    done: asyncio.Future[bytes] = loop.create_future()
    pair.far.on_message(handler)
    pair.near.send_message(b"bad")
    pair.near.send_message(b"good")
    assert await patiently(done) == b"good"
    assert isinstance(reported[0], RuntimeError)


# Frames


@pytest.mark.parametrize("size", [0, 1, 64, 65, 4095, 4096, 65_537, 262_100, 262_144, 273_405, 1 << 20, SLOT - 1, SLOT])
async def test_a_frame_of_any_size_lands_in_the_posted_buffer(made: Backends, size: int) -> None:
    pair = await made.pair()
    frame = os.urandom(size)
    assert await carry(pair.near, pair.far, 1 << 63, frame) == frame
    assert await carry(pair.far, pair.near, 1 << 63, frame) == frame


async def test_many_frames_are_under_way_at_once_and_each_finds_its_buffer(made: Backends) -> None:
    pair = await made.pair()
    frames = {tag: os.urandom(1 + tag * 100_003 % SLOT) for tag in range(1, 17)}
    buffers = {tag: bytearray(SLOT) for tag in frames}
    received = {tag: pair.far.receive(tag, memoryview(buffers[tag])) for tag in reversed(frames)}
    sent = [pair.near.send(tag, memoryview(frame)) for tag, frame in frames.items()]
    for tag, frame in frames.items():
        assert await patiently(received[tag]) == len(frame)
        assert buffers[tag][: len(frame)] == frame
    for future in sent:
        await patiently(future)


async def test_both_directions_carry_frames_and_messages_at_once(made: Backends) -> None:
    pair = await made.pair()
    at_far = Messages(pair.far)
    frame = os.urandom(SLOT)

    async def one_way(one: Connection, other: Connection) -> None:
        for tag in range(4):
            assert await carry(one, other, tag, frame) == frame
            one.send_message(b"%d" % tag)

    await asyncio.gather(one_way(pair.near, pair.far), one_way(pair.far, pair.near))
    assert await at_far.take(4) == [b"0", b"1", b"2", b"3"]


async def test_two_connections_with_the_same_tags_do_not_mix(made: Backends) -> None:
    host, one, other = await made.started(1), await made.started(2), await made.started(3)
    first, second = await made.connected(one, host), await made.connected(other, host)
    assert (first.far.peer_incarnation, second.far.peer_incarnation) == (2, 3)
    buffers = [bytearray(SLOT), bytearray(SLOT)]
    received = [pair.far.receive(7, memoryview(buffer)) for pair, buffer in zip((first, second), buffers, strict=True)]
    sent = [pair.near.send(7, memoryview(bytes([fill]) * SLOT)) for pair, fill in ((second, 2), (first, 1))]
    await asyncio.gather(*map(patiently, received + sent))
    assert [set(buffer) for buffer in buffers] == [{1}, {2}]


async def test_two_processes_that_connect_to_each_other_at_once_get_two_connections(made: Backends) -> None:
    one, other = await made.started(1), await made.started(2)
    near, back = await asyncio.gather(one.connect(other.address, PATIENCE), other.connect(one.address, PATIENCE))
    far, back_far = await made.arrivals[other].next(), await made.arrivals[one].next()
    assert await carry(near, far, 1, b"there") == b"there"
    await near.close()
    await ended(far)
    assert await carry(back, back_far, 1, b"and back") == b"and back"


async def test_a_short_frame_reports_its_length(made: Backends) -> None:
    pair = await made.pair()
    for size in (0, 10, SLOT - 1):
        buffer = bytearray(b"\xee" * SLOT)
        received = pair.far.receive(size, memoryview(buffer))
        await patiently(pair.near.send(size, memoryview(bytes(size))))
        assert await patiently(received) == size
        assert buffer[size:] == b"\xee" * (SLOT - size)


@pytest.mark.parametrize("size", [65, SLOT + 1])
async def test_a_long_frame_is_an_error_of_its_own_and_the_connection_lives(made: Backends, size: int) -> None:
    pair = await made.pair()
    buffer = bytearray(b"\xee" * (size - 1))
    received = pair.far.receive(1, memoryview(buffer))
    await patiently(pair.near.send(1, memoryview(bytes(size))))
    with pytest.raises(CorruptFrame) as caught:
        await patiently(received)
    assert caught.value.reason == "long"
    assert buffer == b"\xee" * (size - 1)
    assert await carry(pair.near, pair.far, 2, b"alive") == b"alive"


@pytest.mark.parametrize("size", [10, SLOT])
async def test_a_frame_that_nobody_posted_ends_the_connection(made: Backends, size: int) -> None:
    one, other = await made.started(1), await made.started(2)
    pair = await made.connected(one, other)
    buffer = bytearray(b"\xee" * SLOT)
    other_tag = pair.far.receive(2, memoryview(buffer))
    sent = pair.near.send(1, memoryview(bytes(size)))
    await asyncio.gather(ended(pair.far), ended(pair.near))
    assert other.counters.protocol_errors == 1
    assert sent.done()
    assert isinstance(other_tag.exception(), ConnectionClosed)
    assert buffer == b"\xee" * SLOT


async def test_buffers_that_cannot_be_used_are_refused(made: Backends) -> None:
    pair = await made.pair()
    with pytest.raises(ValueError, match="writable"):
        pair.near.receive(1, memoryview(b"read-only"))
    with pytest.raises(ValueError, match="contiguous"):
        pair.near.receive(1, memoryview(bytearray(10))[::2])
    with pytest.raises(ValueError, match="contiguous"):
        pair.near.send(1, memoryview(bytearray(10))[::2])
    with pytest.raises(ValueError, match="u64"):
        pair.near.send(1 << 64, memoryview(b""))
    pair.far.receive(1, memoryview(bytearray(10)))
    with pytest.raises(ValueError, match="posted under tag 1"):
        pair.far.receive(1, memoryview(bytearray(10)))
    assert await carry(pair.near, pair.far, 2, b"alive") == b"alive"


async def test_the_transport_counts_bytes(made: Backends) -> None:
    one, other = await made.started(1), await made.started(2)
    pair = await made.connected(one, other)
    # What the handshake sent is counted once it has left, which is before anything behind it has.
    await carry(pair.near, pair.far, 1, b"behind the handshake")
    sent, received = one.counters.sent_bytes, other.counters.received_bytes
    await carry(pair.near, pair.far, 1, bytes(SLOT))
    assert one.counters.sent_bytes - sent == SLOT
    assert other.counters.received_bytes - received == SLOT


# The end


Ending = Callable[[Pair], object]
ENDINGS = {
    "receiver aborts": lambda pair: pair.far.abort(),
    "sender aborts": lambda pair: pair.near.abort(),
    "both abort": lambda pair: (pair.near.abort(), pair.far.abort()),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
async def test_after_an_end_in_mid_transfer_no_buffer_is_ever_written(made: Backends, ending: Ending) -> None:
    pair = await made.pair()
    frames = [bytearray(b"\x11" * LARGE) for _ in range(4)]
    buffers = [bytearray(LARGE) for _ in range(5)]  # zeros; the last one's frame never comes
    received = [pair.far.receive(tag, memoryview(buffer)) for tag, buffer in enumerate(buffers)]
    order: list[str] = []
    for future in received:
        future.add_done_callback(lambda _: order.append("future"))
    pair.far.on_closed(lambda: order.append("closed"))
    sent = [pair.near.send(tag, memoryview(frame)) for tag, frame in enumerate(frames)]
    await asyncio.wait_for(_begun(buffers[0]), PATIENCE)
    ending(pair)
    assert pair.near.closed or pair.far.closed
    # The futures, not the end of the connection, say that a buffer is free: take each at that moment.
    for future in [*received, *sent]:
        await asyncio.wait({future}, timeout=PATIENCE)
        assert future.done()
    assert any(future.exception() for future in received[1:4]), "the end came too late for this test to show anything"
    for buffer in buffers:
        buffer[:] = b"\xee" * LARGE
    for frame in frames:
        frame[:] = b"\x22" * LARGE
    await asyncio.gather(ended(pair.near), ended(pair.far))
    # A late write has no event to wait for. Another transfer gives it time, and its own bytes must be right.
    again = await made.pair_again()
    assert await carry(again.near, again.far, 0, b"\x33" * LARGE) == b"\x33" * LARGE
    assert all(buffer == b"\xee" * LARGE for buffer in buffers)
    assert isinstance(received[-1].exception(), ConnectionClosed)
    assert order == ["future"] * len(received) + ["closed"]


async def _begun(buffer: bytearray) -> None:
    while buffer[0] == 0:
        await asyncio.sleep(0)


async def test_the_pattern_would_show_a_late_write(made: Backends) -> None:
    """Negative control: the same pattern, laid before the future is done, is overwritten."""
    pair = await made.pair()
    buffer = bytearray(LARGE)
    received = pair.far.receive(1, memoryview(buffer))
    buffer[:] = b"\xee" * LARGE
    await patiently(pair.near.send(1, memoryview(b"\x11" * LARGE)))
    await patiently(received)
    assert 0xEE not in set(buffer)


async def test_close_flushes_messages_and_frames(made: Backends) -> None:
    for i in range(5):
        pair = await made.pair() if i == 0 else await made.pair_again()
        messages = Messages(pair.far)
        buffer = bytearray(SLOT)
        received = pair.far.receive(1, memoryview(buffer))
        sent = pair.near.send(1, memoryview(b"\x11" * SLOT))
        for number in range(50):
            pair.near.send_message(b"%d" % number)
        await pair.near.close()
        assert sent.done()
        assert sent.exception() is None
        assert await patiently(received) == SLOT
        assert await messages.take(50) == [b"%d" % number for number in range(50)]
        await ended(pair.far)
        assert buffer == b"\x11" * SLOT


async def test_on_closed_runs_once_also_when_set_late(made: Backends) -> None:
    pair = await made.pair()
    calls: list[str] = []
    pair.far.on_closed(lambda: calls.append("early"))
    pair.near.abort()
    await ended(pair.far)
    pair.far.abort()
    pair.far.on_closed(lambda: calls.append("late"))
    assert calls == ["early"]
    await ended(pair.far)
    await pair.far.close()
    assert calls == ["early", "late"]


async def test_nothing_is_delivered_or_taken_after_the_end(made: Backends) -> None:
    pair = await made.pair()
    heard: list[bytes] = []
    pair.far.on_message(lambda message: heard.append(bytes(message)))
    pair.near.send_message(b"on its way")
    pair.far.abort()
    await ended(pair.near)
    pair.near.send_message(b"into the void")
    for future in (pair.near.send(1, memoryview(b"x")), pair.far.receive(1, memoryview(bytearray(1)))):
        with pytest.raises(ConnectionClosed):
            await future
    assert heard == []


async def test_a_cancelled_task_does_not_free_the_buffer_that_it_waits_for(made: Backends) -> None:
    pair = await made.pair()
    buffer = bytearray(SLOT)
    received = pair.far.receive(1, memoryview(buffer))
    started = asyncio.Event()

    async def wait() -> None:
        started.set()
        await received

    task = asyncio.create_task(wait())
    await started.wait()
    task.cancel()
    await carry(pair.near, pair.far, 2, b"some time later")
    assert not received.done()
    await patiently(pair.near.send(1, memoryview(b"\x11" * SLOT)))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await received == SLOT
    assert buffer == b"\x11" * SLOT


async def test_closing_the_transport_ends_everything(made: Backends) -> None:
    one, other = await made.started(1), await made.started(2)
    pair = await made.connected(one, other)
    received = pair.far.receive(1, memoryview(bytearray(SLOT)))
    await other.close()
    assert pair.far.closed
    assert isinstance(received.exception(), ConnectionClosed)
    await ended(pair.near)
    with pytest.raises((ConnectionClosed, TimeoutError)):
        await one.connect(other.address, 1.0)
    with pytest.raises(ConnectionClosed):
        await other.connect(one.address, 1.0)


# Who may connect


async def test_incarnations_are_exchanged_in_full(made: Backends) -> None:
    one, other = await made.started((1 << 64) - 1), await made.started(1 << 63)
    pair = await made.connected(one, other)
    assert pair.near.peer_incarnation == 1 << 63
    assert pair.far.peer_incarnation == (1 << 64) - 1


async def test_a_peer_with_another_key_is_refused_on_both_sides(made: Backends) -> None:
    host, stranger = await made.started(1), await made.started(2, data_key=b"another key")
    with pytest.raises(HandshakeRefused):
        await stranger.connect(host.address, PATIENCE)
    guest = await made.started(3)
    await made.connected(guest, host)  # and the next one is served
    assert host.counters.refused_handshakes == 1
    assert stranger.counters.refused_handshakes == 1
    assert made.arrivals[host].empty


async def test_an_empty_key_is_no_key(made: Backends) -> None:
    with pytest.raises(SettingError):
        made.make(1, data_key=b"")


async def test_a_silent_peer_is_dropped_at_the_handshake_timeout(made: Backends) -> None:
    host = await made.started(1, handshake_timeout=0.2)
    await made.say_nothing(host)
    assert host.counters.refused_handshakes == 1
    assert made.arrivals[host].empty


async def test_connections_beyond_the_limit_are_refused_and_a_free_place_is_used_again(made: Backends) -> None:
    host, guest = await made.started(1, max_connections=2), await made.started(2)
    first, _second = await made.connected(guest, host), await made.connected(guest, host)
    with pytest.raises((ConnectionClosed, TimeoutError)):
        await guest.connect(host.address, 2.0)
    assert host.counters.refused_handshakes == 1
    await first.near.close()
    await ended(first.far)
    await made.connected(guest, host)


async def test_connecting_to_nobody_fails(made: Backends) -> None:
    transport = await made.started(1)
    for address in (await made.unreachable(), "", "nonsense", f"{transport.scheme}://", "http://[::1"):
        with pytest.raises(ConnectionClosed):
            await transport.connect(address, PATIENCE)


async def test_a_peer_can_come_back_many_times(made: Backends) -> None:
    host, guest = await made.started(1), await made.started(2)
    for i in range(20):
        pair = await made.connected(guest, host)
        assert await carry(pair.near, pair.far, 1, b"%d" % i) == b"%d" % i
        if i % 2:
            pair.near.abort()
        else:
            await pair.far.close()
        await asyncio.gather(ended(pair.near), ended(pair.far))


# The pool


async def test_the_pool_connects_once_for_all_that_ask(made: Backends) -> None:
    host, guest = await made.started(1), await made.started(2)
    pool = ConnectionPool(guest)
    connections = await asyncio.gather(*(pool.get(host.address, 1, PATIENCE) for _ in range(5)))
    assert len({id(connection) for connection in connections}) == 1
    assert await pool.get(host.address, 1, PATIENCE) is connections[0]
    await made.arrivals[host].next()
    assert made.arrivals[host].empty
    await pool.close()
    assert len(pool) == 0


async def test_the_pool_replaces_a_connection_that_has_ended(made: Backends) -> None:
    host, guest = await made.started(1), await made.started(2)
    pool = ConnectionPool(guest)
    first = await pool.get(host.address, 1, PATIENCE)
    (await made.arrivals[host].next()).abort()
    await ended(first)
    second = await pool.get(host.address, 1, PATIENCE)
    assert second is not first
    assert not second.closed
    await pool.close()


async def test_the_pool_never_hands_out_another_incarnation(made: Backends) -> None:
    host, guest = await made.started(1), await made.started(2)
    pool = ConnectionPool(guest)
    with pytest.raises(ConnectionClosed, match="another incarnation"):
        await pool.get(host.address, 99, PATIENCE)
    assert len(pool) == 0
    await ended(await made.arrivals[host].next())


async def test_a_caller_that_gives_up_does_not_end_the_attempt_of_another(made: Backends) -> None:
    host, guest = await made.started(1), await made.started(2)
    pool = ConnectionPool(guest)
    hasty = asyncio.create_task(pool.get(host.address, 1, PATIENCE))
    patient = asyncio.create_task(pool.get(host.address, 1, PATIENCE))
    await asyncio.sleep(0)
    hasty.cancel()
    assert not (await patiently(patient)).closed
    assert hasty.cancelled()
    await pool.close()


# The other event loop


@pytest.mark.parametrize("kind", [UcxBackends, TcpBackends], ids=["ucx", "tcp"])
@pytest.mark.parametrize(
    "scenario",
    [
        test_flow_messages_arrive_in_order_in_both_directions,
        test_many_frames_are_under_way_at_once_and_each_finds_its_buffer,
        test_both_directions_carry_frames_and_messages_at_once,
        test_close_flushes_messages_and_frames,
        test_a_cancelled_task_does_not_free_the_buffer_that_it_waits_for,
        test_a_peer_with_another_key_is_refused_on_both_sides,
        test_a_silent_peer_is_dropped_at_the_handshake_timeout,
    ],
)
def test_on_uvloop_too(kind: type[Backends], scenario: Callable[[Backends], Awaitable[None]]) -> None:
    async def run() -> None:
        async with backends(kind) as opened:
            await scenario(opened)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("kind", [UcxBackends, TcpBackends], ids=["ucx", "tcp"])
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_ends_in_mid_transfer_on_uvloop_too(kind: type[Backends], ending: Ending) -> None:
    async def run() -> None:
        async with backends(kind) as opened:
            await test_after_an_end_in_mid_transfer_no_buffer_is_ever_written(opened, ending)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
