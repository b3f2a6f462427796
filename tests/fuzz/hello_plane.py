"""What opens a data-plane connection: handshakes that are forged, and bytes that no peer of ours would send.

Nobody is let in who does not hold the cluster's key, and a TCP port that was shouted at serves its peers as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Final
from urllib.parse import urlsplit

from fuzz.campaign import Batch
from fuzz.messages import Ids, Messages
from fuzz.spoiling import spoiled
from leaks import Holdings, leaks_since
from transports import DATA_KEY, PATIENCE, TcpBackends
from transports import Messages as Received

from kvferry.errors import HandshakeRefused
from kvferry.transport.base import Transport
from kvferry.transport.hello import Handshake
from kvferry.transport.tcp import HEADER, KIND_FLOW, KIND_FRAME
from kvferry.wire.flow import Flow, FlowCodec

SOCKETS: Final = 0.2  # share of the inputs that are sent to a real port


def hello_plane(batch: Batch) -> None:
    num_sockets = round(batch.num_cases * SOCKETS)
    for _ in range(batch.num_cases - num_sockets):
        _handshake(batch)
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda _, context: batch.unexpected(f"in the loop: {context}"))
        runner.run(_shouting(batch, num_sockets))


def _handshake(batch: Batch) -> None:
    """An acceptor, a peer with or without the key, and something between them."""
    chance = batch.chance
    knows = chance.random() < 0.9
    acceptor = Handshake("acceptor", DATA_KEY, 2, chance.randbytes(16))
    peer = Handshake("initiator", DATA_KEY if knows else b"another key", 1, chance.randbytes(16))
    hello = peer.opening()
    proof = peer.feed(memoryview(acceptor.opening()))
    assert proof is not None
    sent = [hello, proof]
    meddled = chance.random() < 0.5
    if meddled:
        sent = _meddled(chance, sent)
    with batch.trying(sent), contextlib.suppress(HandshakeRefused):
        for message in sent:
            if acceptor.done:
                break
            acceptor.feed(memoryview(message))
    if acceptor.done:
        assert knows, "a peer without the key was let in"
        assert sent[:2] == [hello, proof], "a handshake that was meddled with was taken"
        assert acceptor.peer_incarnation == 1
    batch.count(mutated=True, valid=acceptor.done)


def _meddled(chance: random.Random, sent: list[bytes]) -> list[bytes]:
    place = chance.randrange(2)
    match chance.randrange(5):
        case 0:
            return sent[::-1]
        case 1:
            return [*sent[:place], sent[place], *sent[place:]]
        case 2:
            return sent[:place]
        case 3:
            return [*sent[:place], FlowCodec().encode(Messages(chance, Ids()).any_of(Flow)), *sent[place + 1 :]]
        case _:
            return [*sent[:place], spoiled(chance, sent[place]), *sent[place + 1 :]]


async def _shouting(batch: Batch, count: int) -> None:
    before = Holdings.now()
    made = TcpBackends()
    try:
        host, guest = await made.started(1), await made.started(2)
        pair = await made.connected(guest, host)
        heard = Received(pair.far)
        for _ in range(count):
            data = _bytes(batch.chance)
            with batch.trying(data):
                await _throw(host, data)
            batch.count(mutated=False, valid=False)
        assert made.arrivals[host].empty, "somebody was let in"
        pair.near.send_message(b"undisturbed")
        assert await heard.take(1) == [b"undisturbed"]
    finally:
        await made.close()
    left = await leaks_since(before)
    assert not left, left


def _bytes(chance: random.Random) -> bytes:
    """A stream of messages as TCP carries them, right or not."""
    data = b""
    for _ in range(chance.randint(1, 3)):
        message = FlowCodec().encode(Messages(chance, Ids()).any_of(Flow))
        kind = chance.choice((KIND_FLOW, KIND_FLOW, KIND_FLOW, KIND_FRAME, 0, 255))
        length = chance.choice((len(message), len(message), len(message) + 1, 0, (1 << 32) - 1))
        data += HEADER.pack(kind, length, chance.getrandbits(64)) + message
    return spoiled(chance, data) if chance.random() < 0.5 else data


async def _throw(host: Transport, data: bytes) -> None:
    """Send bytes, end our side, and wait until the host hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(host.address).port)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            writer.write_eof()
            async with asyncio.timeout(PATIENCE):
                while await reader.read(4096):
                    pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
