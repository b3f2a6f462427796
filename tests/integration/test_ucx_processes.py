"""The data plane between real processes: what kills, freezes, restarts and idles do, over UCX and TCP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from transport_peer import DATA_KEY
from transports import PATIENCE, Messages, ended, patiently, unused_port

from kvferry.errors import ConnectionClosed
from kvferry.runtime import SystemRuntime
from kvferry.transport.base import Connection, Transport, TransportSettings
from kvferry.transport.factory import open_transport

pytestmark = pytest.mark.usefixtures("no_leaks")
PEER = Path(__file__).parents[1] / "transport_peer.py"
LARGE = 64 << 20  # takes tens of milliseconds
NOTICE_S = 3.0  # in which a dead peer must be noticed; it takes milliseconds, and keepalive would take 5 s
IDLE_S = 5.0
TRIES = 5  # of a kill that must fall into a transfer, on a busy machine
LISTEN = "0A"  # the state's code in /proc/net/tcp


@asynccontextmanager
async def running_peer(kind: str, port: int = 0, *options: str) -> AsyncIterator[tuple[Process, str]]:
    process = await asyncio.create_subprocess_exec(sys.executable, PEER, kind, str(port), *options, stdout=PIPE)
    assert process.stdout is not None
    try:
        address = (await asyncio.wait_for(process.stdout.readline(), PATIENCE)).decode().strip()
        yield process, address
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def running_transport(kind: str) -> AsyncIterator[Transport]:
    settings = TransportSettings(incarnation=1, data_key=DATA_KEY)
    transport = open_transport(kind, settings, SystemRuntime())
    await transport.start(lambda connection: connection.abort())
    try:
        yield transport
    finally:
        await transport.close()


@pytest.fixture(params=["ucx", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def transport(kind: str) -> AsyncIterator[Transport]:
    async with running_transport(kind) as made:
        yield made


async def begun(buffer: bytearray) -> None:
    while buffer[0] == 0:
        await asyncio.sleep(0)


async def fetch(connection: Connection, tag: int, size: int) -> bytes:
    buffer = bytearray(size)
    received = connection.receive(tag, memoryview(buffer))
    connection.send_message(b"send %d %d 170" % (tag, size))
    assert await patiently(received) == size
    return bytes(buffer)


async def cut_off(kind: str, transport: Transport) -> list[bytearray] | None:
    """Buffers that a peer was killed over while it sent into them. None: it had sent all before it died."""
    async with running_peer(kind) as (process, address):
        connection = await transport.connect(address, PATIENCE)
        buffers = [bytearray(LARGE) for _ in range(3)]
        received = [connection.receive(tag, memoryview(buffer)) for tag, buffer in enumerate(buffers)]
        for tag in range(2):  # the third is posted and never comes
            connection.send_message(b"send %d %d 17" % (tag, LARGE))
        await asyncio.wait_for(begun(buffers[0]), PATIENCE)
        process.kill()
        killed = time.monotonic()
        await ended(connection)
        assert time.monotonic() - killed < NOTICE_S
        ends = [future.exception() for future in received]
        assert all(end is None or isinstance(end, ConnectionClosed) for end in ends), ends
        assert ends[2] is not None
        return None if ends[1] is None else buffers


async def test_a_peer_killed_while_it_sends_is_noticed_and_its_buffers_are_ours(
    kind: str, transport: Transport
) -> None:
    for _ in range(TRIES):
        if (buffers := await cut_off(kind, transport)) is not None:
            break
    else:
        pytest.fail("whatever a peer sends was sent before it could be killed")
    for buffer in buffers:
        buffer[:] = b"\xee" * LARGE
    async with running_peer(kind) as (_, address):  # another transfer gives a late write its time
        again = await transport.connect(address, PATIENCE)
        assert await fetch(again, 9, LARGE) == b"\xaa" * LARGE
    assert all(buffer == b"\xee" * LARGE for buffer in buffers)


async def test_a_peer_killed_while_we_send_is_noticed(kind: str, transport: Transport) -> None:
    async with running_peer(kind) as (process, address):
        connection = await transport.connect(address, PATIENCE)
        messages = Messages(connection)
        frame = memoryview(bytes(LARGE))
        for tag in range(4):
            connection.send_message(b"post %d %d" % (tag, LARGE))
        await messages.take(4)
        os.kill(process.pid, signal.SIGSTOP)  # so that no send can end before the kill
        sent = [connection.send(tag, frame) for tag in range(4)]
        process.kill()
        killed = time.monotonic()
        await ended(connection)
        assert time.monotonic() - killed < NOTICE_S
        assert any(isinstance(future.exception(), ConnectionClosed) for future in sent)
        assert all(future.done() for future in sent)


async def test_a_frozen_peer_neither_blocks_our_loop_nor_our_abort(kind: str, transport: Transport) -> None:
    async with running_peer(kind) as (process, address), running_peer(kind) as (_, other_address):
        frozen = await transport.connect(address, PATIENCE)
        other = await transport.connect(other_address, PATIENCE)
        messages = Messages(frozen)
        frozen.send_message(b"post 1 %d" % LARGE)
        await messages.take(1)
        os.kill(process.pid, signal.SIGSTOP)
        received = frozen.receive(2, memoryview(bytearray(LARGE)))
        sent = frozen.send(1, memoryview(bytes(LARGE)))
        lags = []
        for tag in range(20):  # another connection goes on, and the loop turns
            before = time.monotonic()
            assert set(await fetch(other, tag, 1 << 20)) == {170}
            lags.append(time.monotonic() - before)
        assert sorted(lags)[len(lags) // 2] < 0.25
        assert not received.done()
        assert not sent.done()
        before = time.monotonic()
        frozen.abort()
        await ended(frozen)
        assert time.monotonic() - before < NOTICE_S
        assert isinstance(received.exception(), ConnectionClosed)
        assert isinstance(sent.exception(), ConnectionClosed)
        os.kill(process.pid, signal.SIGCONT)
        again = await transport.connect(address, PATIENCE)
        assert set(await fetch(again, 1, 1000)) == {170}


async def test_closing_while_the_peer_is_frozen_takes_about_a_second(kind: str, transport: Transport) -> None:
    async with running_peer(kind) as (process, address):
        connection = await transport.connect(address, PATIENCE)
        os.kill(process.pid, signal.SIGSTOP)
        before = time.monotonic()
        await connection.close()
        assert time.monotonic() - before < 5.0


async def test_an_idle_connection_with_a_pending_receive_costs_no_cpu(kind: str, transport: Transport) -> None:
    async with running_peer(kind) as (process, address):
        connection = await transport.connect(address, PATIENCE)
        await fetch(connection, 1, 4 << 20)
        pending = connection.receive(2, memoryview(bytearray(4 << 20)))
        connection.send_message(b"post 3 100")
        mine, theirs = time.process_time(), cpu_seconds(process.pid)
        await asyncio.sleep(IDLE_S)
        assert time.process_time() - mine <= 0.02 * IDLE_S
        assert cpu_seconds(process.pid) - theirs <= 0.02 * IDLE_S
        connection.send_message(b"send 2 7 170")
        assert await patiently(pending) == 7  # it was idle, not dead


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_fifty_reconnects_leave_nothing_behind_at_the_peer(kind: str, transport: Transport) -> None:
    async with running_peer(kind) as (process, address):
        descriptors = f"/proc/{process.pid}/fd"
        first = await transport.connect(address, PATIENCE)
        await fetch(first, 1, 100_000)
        await first.close()
        before = len(os.listdir(descriptors))
        for i in range(50):
            connection = await transport.connect(address, PATIENCE)
            assert connection.peer_incarnation == 7
            await fetch(connection, 1, 100_000)
            if i % 2:
                connection.abort()
            await connection.close()
        last = await transport.connect(address, PATIENCE)
        await fetch(last, 1, 100_000)
        assert len(os.listdir(descriptors)) <= before + 4  # what this last connection holds


async def test_a_peer_restarts_on_its_port_at_once(kind: str, transport: Transport) -> None:
    port = unused_port()
    for i in range(5):
        async with running_peer(kind, port) as (process, address):
            connection = await transport.connect(address, PATIENCE)
            assert set(await fetch(connection, 1, 300_000)) == {170}
            process.send_signal(signal.SIGKILL if i % 2 else signal.SIGTERM)
            await ended(connection)


@pytest.mark.parametrize("options", [(), ("--careless",)], ids=["closed", "left open"])
async def test_a_process_ends_soon_after_sigterm_and_prints_nothing_else(
    kind: str, transport: Transport, options: tuple[str, ...]
) -> None:
    async with running_peer(kind, 0, *options) as (process, address):
        connection = await transport.connect(address, PATIENCE)
        await fetch(connection, 1, 1 << 20)
        process.terminate()
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == 0
        assert output == b""
        await ended(connection)


async def test_only_loopback_ports_are_open(kind: str) -> None:
    async with running_peer(kind) as (process, address):
        listening = listening_sockets(process.pid)
        assert urlsplit(address).port in {port for _, port in listening}
        assert {host for host, _ in listening} == {"127.0.0.1"}
        assert len(listening) == (2 if kind == "ucx" else 1)


def listening_sockets(pid: int) -> list[tuple[str, int]]:
    """(host, port) of every IPv4 socket that a process listens on; none may listen on IPv6."""
    mine = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            mine.add(os.readlink(entry))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in mine:
                assert table == "tcp"
                host, port = fields[1].split(":")
                found.append((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found


async def test_garbage_at_every_open_port_disturbs_nothing(kind: str, transport: Transport) -> None:
    async with running_peer(kind) as (process, address):
        connection = await transport.connect(address, PATIENCE)
        for _, port in listening_sockets(process.pid):
            for garbage in (b"", b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(garbage)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        silent = [await asyncio.open_connection("127.0.0.1", port) for _, port in listening_sockets(process.pid)]
        assert set(await fetch(connection, 1, 4 << 20)) == {170}
        another = await transport.connect(address, PATIENCE)
        assert set(await fetch(another, 1, 4 << 20)) == {170}
        for _, writer in silent:
            writer.close()


async def test_garbage_of_a_port_scan_leaves_no_descriptor_behind(kind: str, transport: Transport) -> None:
    async with running_peer(kind) as (process, _):
        descriptors = f"/proc/{process.pid}/fd"
        before = len(os.listdir(descriptors))
        for _, port in listening_sockets(process.pid):
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, os.urandom(4096)):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(garbage)
                await writer.drain()
                writer.close()
        async with asyncio.timeout(PATIENCE):
            while len(os.listdir(descriptors)) > before:
                await asyncio.sleep(0.01)


async def test_the_environment_is_left_as_it_was() -> None:
    before = dict(os.environ)
    async with running_transport("ucx"):
        pass
    assert dict(os.environ) == before
