"""Who is not invited to the data plane gets nothing: no key, another's handshake, a ticket that is wrong or too old."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from cluster import DATA_KEY, Cluster, prompt_of, settled, virtual
from test_handoff_frames import Peer

from kvferry.runtime import SystemRuntime
from kvferry.transport.base import Connection, TransportSettings
from kvferry.transport.hello import Handshake
from kvferry.transport.tcp import HEADER, KIND_FLOW, TcpTransport
from kvferry.wire.flow import Aborted, Fetch, Flow, FlowCodec, Hello, Open, Progress, Prove, Unknown
from kvferry.wire.work import PrefillRequest
from kvferry_prefill.worker import PrefillWorker

PATIENCE_S = 60.0
HANDSHAKE_S = 1.0


# -- a ticket, by a peer that has the key ----------------------------------------------------------------------------


def sent_bytes(prefill: PrefillWorker) -> float:
    return prefill.metrics.value("kvferry_kv_bytes_total", direction="sent")


def test_kv_is_given_for_its_ticket_and_attempt_alone_and_only_until_its_lease_ends() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(lease_s=5.0)
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(100))
        gateway.expect(work, prefill)
        await gateway.ask(prefill, PrefillRequest(work))
        await settled(lambda: prefill.scheduler.sequences[work.key].state == "held", within=1.0)
        peer = Peer(cluster)
        await peer.connect(prefill)
        for pull_id, (ticket, attempt) in enumerate(((work.ticket, work.attempt + 1), (bytes(16), work.attempt)), 1):
            peer.post(pull_id, 4)
            peer.say(Open(pull_id, ticket, attempt))
            peer.say(Fetch(pull_id, 0, 4))
        await settled(lambda: sum(isinstance(m, Unknown | Aborted) for m in peer.heard) == 2, within=1.5)
        assert not peer.answer(Progress)
        assert sent_bytes(prefill) == 0
        await settled(lambda: work.key not in prefill.scheduler.sequences, within=6.0)
        peer.heard.clear()
        peer.post(3, 4)
        peer.say(Open(3, work.ticket, work.attempt))
        peer.say(Fetch(3, 0, 4))
        await settled(lambda: bool(peer.heard), within=1.0)
        assert peer.heard == [Aborted(3, 0, "expired")]
        assert sent_bytes(prefill) == 0
        assert prefill.scheduler.memory.pool.num_free == prefill.runner.num_blocks
        await gateway.cancel(work, prefill)
        await peer.close()

    virtual(scenario)


def test_negative_control_the_right_ticket_in_time_gets_the_kv() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(100))
        gateway.expect(work, prefill)
        await gateway.ask(prefill, PrefillRequest(work))
        peer = Peer(cluster)
        connection = await peer.connect(prefill)
        slots = [bytearray(1 << 20) for _ in range(4)]
        for frame, slot in enumerate(slots):
            connection.receive(1 << 32 | frame, memoryview(slot))
        peer.say(Open(1, work.ticket, work.attempt))
        await settled(lambda: peer.answer(Progress), within=1.0)
        peer.say(Fetch(1, 0, 4))
        await settled(lambda: sent_bytes(prefill) > 0, within=2.0)
        await peer.close()
        await gateway.cancel(work, prefill)

    virtual(scenario)


# -- no key, over real sockets -----------------------------------------------------------------------------------


class Listening:
    """A TCP transport with the key, and whoever it took for a peer."""

    def __init__(self) -> None:
        settings = TransportSettings(incarnation=1, data_key=DATA_KEY, handshake_timeout=HANDSHAKE_S)
        self.transport = TcpTransport(settings, SystemRuntime())
        self.peers: list[Connection] = []
        self.heard: list[bytes] = []

    def taken(self, connection: Connection) -> None:
        self.peers.append(connection)
        connection.on_message(lambda message: self.heard.append(bytes(message)))

    async def hear(self, sent: bytes) -> list[Flow]:
        """What a stranger hears that sends these bytes, until it is shown out."""
        host, port = self.transport.address.removeprefix("tcp://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        async with asyncio.timeout(PATIENCE_S):
            try:
                answer = await reader.read()
            except ConnectionResetError:
                answer = b""
        writer.close()
        return unframed(answer)


@pytest.fixture
async def listening(no_leaks: None) -> AsyncIterator[Listening]:
    made = Listening()
    await made.transport.start(made.taken)
    yield made
    await made.transport.close()


def framed(*messages: Flow) -> bytes:
    codec = FlowCodec()
    encoded = [codec.encode(message) for message in messages]
    return b"".join(HEADER.pack(KIND_FLOW, len(message), 0) + message for message in encoded)


def unframed(answer: bytes) -> list[Flow]:
    found: list[Flow] = []
    while answer:
        _, length, _ = HEADER.unpack(answer[: HEADER.size])
        found.append(FlowCodec().decode(answer[HEADER.size : HEADER.size + length]))
        answer = answer[HEADER.size + length :]
    return found


OPEN = Open(1, b"t" * 16, 1)
HELLO = Hello(4711, b"n" * 16)
STRANGERS = {
    "says nothing": b"",
    "asks at once": framed(OPEN),
    "greets and asks": framed(HELLO, OPEN),
    "guesses a proof": framed(HELLO, Prove(bytes(32)), OPEN),
}


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_without_the_key_nothing_is_delivered_and_nothing_but_a_greeting_comes_back(
    listening: Listening, stranger: str
) -> None:
    heard = await listening.hear(STRANGERS[stranger])
    assert all(isinstance(message, Hello | Prove) for message in heard)
    assert (listening.peers, listening.heard) == ([], [])
    assert listening.transport.counters.refused_handshakes == 1
    async with asyncio.timeout(PATIENCE_S):
        while listening.transport.num_connections:  # until it has heard that the stranger hung up, too
            await asyncio.sleep(0.005)


@asynccontextmanager
async def recorded(listening: Listening) -> AsyncIterator[bytearray]:
    """What an honest peer sends from its first byte on, as somebody on the way hears it."""
    heard = bytearray()
    host, port = listening.transport.address.removeprefix("tcp://").split(":")
    pipes: list[asyncio.Task[None]] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, copy: bytearray | None) -> None:
        while data := await reader.read(1 << 16):
            if copy is not None:
                copy += data
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection(host, int(port))
        pipes.append(asyncio.ensure_future(pipe(reader, back, heard)))
        pipes.append(asyncio.ensure_future(pipe(onward, writer, None)))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    settings = TransportSettings(incarnation=2, data_key=DATA_KEY)
    honest = TcpTransport(settings, SystemRuntime())
    await honest.start(lambda connection: None)
    connection = await honest.connect(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", PATIENCE_S)
    connection.send_message(FlowCodec().encode(OPEN))
    async with asyncio.timeout(PATIENCE_S):
        while not listening.heard:
            await asyncio.sleep(0.005)
    yield heard
    await honest.close()
    await asyncio.gather(*pipes)
    server.close()
    await server.wait_closed()


async def test_a_handshake_that_was_overheard_opens_no_second_connection(listening: Listening) -> None:
    async with recorded(listening) as heard:
        assert len(listening.peers) == 1
        replayed = bytes(heard)
        assert FlowCodec().encode(OPEN) in replayed
        answers = await listening.hear(replayed)
    assert all(isinstance(message, Hello | Prove) for message in answers)
    assert len(listening.peers) == 1
    assert len(listening.heard) == 1
    assert listening.transport.counters.refused_handshakes == 1


async def test_another_clusters_key_opens_nothing(listening: Listening) -> None:
    stranger = Handshake("initiator", b"another cluster's key, 32 bytes.", 4711, b"n" * 16)
    host, port = listening.transport.address.removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    opening = stranger.opening()
    writer.write(HEADER.pack(KIND_FLOW, len(opening), 0) + opening)
    _, length, _ = HEADER.unpack(await reader.readexactly(HEADER.size))
    proof = stranger.feed(memoryview(await reader.readexactly(length)))
    assert proof is not None
    writer.write(HEADER.pack(KIND_FLOW, len(proof), 0) + proof + framed(OPEN))
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    assert all(isinstance(message, Prove) for message in unframed(answer))
    assert (listening.peers, listening.heard) == ([], [])
    assert listening.transport.counters.refused_handshakes == 1
