"""What the TCP backend does with bytes that no peer of ours would send. Each is counted and disturbs nobody."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from transports import PATIENCE, Messages, Pair, TcpBackends, backends

from kvferry.errors import SettingError, TransportUnavailable
from kvferry.runtime import SystemRuntime
from kvferry.transport.base import Transport, TransportSettings
from kvferry.transport.tcp import HEADER, KIND_FLOW, KIND_FRAME, MAX_FRAME_BYTES, TcpTransport
from kvferry.wire.codec import WIRE_VERSION
from kvferry.wire.flow import MAX_FLOW_BYTES, FlowCodec, Hello

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
async def made() -> AsyncIterator[TcpBackends]:
    async with backends(TcpBackends) as opened:
        assert isinstance(opened, TcpBackends)
        yield opened


async def throw(host: Transport, data: bytes) -> None:
    """Send bytes and wait until the host hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(host.address).port)
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def flow(message: bytes) -> bytes:
    return HEADER.pack(KIND_FLOW, len(message), 0) + message


OTHER_VERSION = bytes([WIRE_VERSION + 1]) + FlowCodec().encode(Hello(1, bytes(16)))[1:]


@pytest.mark.parametrize(
    ("data", "counter"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "protocol_errors"),
        (b"\0" * 64, "protocol_errors"),
        (b"\xff" * 4096, "protocol_errors"),
        (HEADER.pack(KIND_FLOW, MAX_FLOW_BYTES + 1, 0), "protocol_errors"),
        (HEADER.pack(KIND_FRAME, 10, 1) + bytes(10), "protocol_errors"),
        (HEADER.pack(KIND_FRAME, MAX_FRAME_BYTES + 1, 1), "protocol_errors"),
        (flow(b""), "refused_handshakes"),
        (flow(b"nonsense"), "refused_handshakes"),
        (flow(OTHER_VERSION), "refused_handshakes"),
        (flow(FlowCodec().encode(Hello(1, bytes(16)))) * 2, "refused_handshakes"),
    ],
)
async def test_garbage_ends_its_own_connection_and_is_counted(made: TcpBackends, data: bytes, counter: str) -> None:
    host, guest = await made.started(1), await made.started(2)
    pair = await made.connected(guest, host)
    await throw(host, data)
    assert (host.counters.protocol_errors, host.counters.refused_handshakes) == (
        (1, 0) if counter == "protocol_errors" else (0, 1)
    )
    await still_works(pair)


async def still_works(pair: Pair) -> None:
    messages = Messages(pair.far)
    pair.near.send_message(b"undisturbed")
    assert await messages.take(1) == [b"undisturbed"]


async def test_a_header_in_pieces_is_put_together(made: TcpBackends) -> None:
    """Also the negative control of the tests above: a well-formed hello in single bytes is answered."""
    host = await made.started(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(host.address).port)
    for byte in flow(FlowCodec().encode(Hello(5, bytes(16)))):
        writer.write(bytes([byte]))
        await writer.drain()
    for expected in ("Hello", "Prove"):
        kind, length, _ = HEADER.unpack(await asyncio.wait_for(reader.readexactly(HEADER.size), PATIENCE))
        assert kind == KIND_FLOW
        assert type(FlowCodec().decode(await reader.readexactly(length))).__name__ == expected
    writer.close()
    await writer.wait_closed()
    assert host.counters.protocol_errors == 0


async def test_a_port_that_is_taken_is_a_clear_error(made: TcpBackends) -> None:
    host = await made.started(1)
    other = made.make(2, port=urlsplit(host.address).port)
    with pytest.raises(TransportUnavailable, match="cannot listen"):
        await other.start(lambda connection: None)


def test_the_header_has_the_layout_that_its_module_states() -> None:
    assert HEADER.size == 13
    assert HEADER.pack(2, 3, 4) == b"\x02" + struct.pack("<I", 3) + struct.pack("<Q", 4)


def test_a_transport_without_a_key_cannot_be_made() -> None:
    with pytest.raises(SettingError, match="data_key"):
        TcpTransport(TransportSettings(1, b""), SystemRuntime())
