"""Workers with real threads, real sockets and a real HTTP port: what they show, and that they leave nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from cluster import GREEDY, Cluster, expected, prompt_of, settled

from kvferry.engine.memory.runner import MemoryRunner, MemorySettings
from kvferry.errors import SettingError
from kvferry.runtime import SystemRuntime
from kvferry.transport.base import TransportSettings
from kvferry.transport.slots import SlotPool
from kvferry.transport.tcp import TcpTransport
from kvferry.wire.record import WorkerAddress
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import DecodeRequest
from kvferry.worker import debug
from kvferry.worker.debug import DebugServer
from kvferry.worker.parts import Parts
from kvferry_decode.settings import DecodeSettings
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.settings import PrefillSettings
from kvferry_prefill.worker import PrefillWorker

pytestmark = pytest.mark.usefixtures("no_leaks")
MODEL = MemorySettings(num_blocks=64, num_layers=4)
PATIENCE_S = 60.0


@asynccontextmanager
async def threaded(cluster: Cluster) -> AsyncIterator[tuple[PrefillWorker, DecodeWorker]]:
    """A pair over TCP with its own engine and copy threads; only the bus is in memory."""
    runtime = SystemRuntime()

    async def parts(name: str, role: str) -> Parts:
        bus = cluster.bus(name, role)
        await bus.start()
        incarnation = runtime.random_u64()
        transport = TcpTransport(TransportSettings(incarnation=incarnation, data_key=b"k" * 32), runtime)
        slots = SlotPool(8, 64 << 10)
        return Parts(runtime, bus, transport, slots, MemoryRunner(MODEL), incarnation, "memory", 1)

    prefill = PrefillWorker(
        PrefillSettings(name="prefill-0", model="memory", debug_digests=True, max_num_batched_tokens=64),
        await parts("prefill-0", "prefill"),
    )
    decode = DecodeWorker(
        DecodeSettings(name="decode-0", model="memory", debug_digests=True), await parts("decode-0", "decode")
    )
    for worker in (prefill, decode):
        await worker.transport.start(worker.attach)
        await worker.start()
        cluster.workers.append(worker)
    try:
        yield prefill, decode
    finally:
        await cluster.stop()


async def test_a_hand_off_over_tcp_with_real_threads_gives_the_same_tokens() -> None:
    cluster = Cluster()
    async with threaded(cluster) as (prefill, decode):
        gateway = await cluster.gateway()
        for n in range(3):
            prompt = prompt_of(300 + n, seed=n)
            work = await gateway.run(prompt, decode, prefill)
            assert gateway.text(work) == expected(prompt, GREEDY, 8, MODEL)
            ticket = work.ticket.hex()
            # The copy lanes make them, beside the tokens.
            await gateway.until(lambda t=ticket: t in prefill.digests.rows() and t in decode.digests.rows(), limit=5)  # type: ignore[misc]
            assert decode.digests.rows()[ticket] == prefill.digests.rows()[ticket]
        await gateway.until(lambda: len(prefill.outbox) + len(decode.outbox) == 0, limit=5)


async def test_a_stop_in_the_middle_of_pulls_and_steps_ends_and_leaves_no_thread() -> None:
    cluster = Cluster()
    async with threaded(cluster) as (prefill, decode):
        gateway = await cluster.gateway()
        long = Sampling(temperature=0.0, max_tokens=500)
        for n in range(3):
            await gateway.place(gateway.work(prompt_of(250, seed=n), sampling=long), decode, prefill)
        await gateway.until(lambda: bool(gateway.tokens), limit=5)
        for worker in list(cluster.workers):
            await worker.stop()
            assert len(worker.tasks) == 0
            assert worker.slots.num_free == worker.slots.num_slots
        cluster.workers.clear()
        await gateway.stop()
        cluster.gateways.clear()


async def test_the_debug_port_shows_health_readiness_metrics_blocks_and_digests() -> None:
    cluster = Cluster()
    async with threaded(cluster) as (prefill, decode):
        gateway = await cluster.gateway()
        work = await gateway.run(prompt_of(100), decode, prefill)
        server = DebugServer("127.0.0.1", 0)
        await server.start(decode)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()) == (200, {"state": "ready"})
            metrics = (await client.get("/metrics")).text
            assert 'kvferry_kv_token_total{direction="received"} 100.0' in metrics
            decode.transport.counters.refused_handshakes += 2
            for _ in range(2):
                metrics = (await client.get("/metrics")).text
            assert 'kvferry_wire_error_total{kind="handshake",plane="data"} 2.0' in metrics
            blocks = (await client.get("/debug/blocks")).json()
            assert sum(blocks["counts"].values()) == blocks["num_blocks"] == 64
            assert blocks["slots"] == {"free": 8}
            assert blocks["holdings"] == []
            assert blocks["shards"] == {}
            digests = (await client.get("/debug/digests")).json()
            assert len(digests[work.ticket.hex()]) == 100
            assert (await client.get("/nothing")).status_code == 404
            leaked = decode.scheduler.memory.pool.allocate(1)
            broken = await client.get("/debug/blocks")
            assert broken.status_code == 500
            assert "do not add up" in broken.json()["error"]
            decode.scheduler.memory.pool.release(leaked)
            decode.state = "wedged"
            wedged = await client.get("/ready")
            assert (wedged.status_code, wedged.json()) == (503, {"state": "wedged"})
            decode.state = "ready"
        await server.stop()


async def test_a_client_of_the_debug_port_that_says_nothing_or_too_much_or_comes_too_often_is_shown_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(debug, "RECEIVE_TIMEOUT", 0.4)
    monkeypatch.setattr(debug, "MAX_CONNECTIONS", 8)
    cluster = Cluster()
    async with threaded(cluster) as (prefill, _):
        server = DebugServer("127.0.0.1", 0)
        await server.start(prefill)
        await settled(lambda: server._server is not None and server._server.started, within=PATIENCE_S)

        async def hears(request: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await reader.read()
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

        assert await hears(b"") == b""
        assert (await hears(b"GET /health HTTP/1.1\r\n")).startswith(b"HTTP/1.1 408 ")
        assert (await hears(b"GET / HTTP/1.1\r\nx: " + bytes(70_000))).startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
        assert (await hears(b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000)).startswith(b"HTTP/1.1 431 ")
        endless = b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"
        assert (await hears(endless)).startswith(b"HTTP/1.1 405 ")  # and is shown out, though its body goes on
        crowd = await asyncio.gather(*(hears(b"") for _ in range(30)))
        assert set(crowd) == {b""}
        health = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        assert b'"ok"' in await hears(health)
        await server.stop()


async def test_a_debug_port_that_is_taken_names_the_setting() -> None:
    server = DebugServer("127.0.0.1", 0)
    other_port = server.port
    server._socket.listen()
    with pytest.raises(SettingError, match="--debug-port"):
        DebugServer("127.0.0.1", other_port)
    await server.stop()


async def test_an_address_that_leads_nowhere_ends_the_attempt() -> None:
    cluster = Cluster()
    async with threaded(cluster) as (prefill, decode):
        gateway = await cluster.gateway()
        for address in ("", "nonsense", "tcp://127.0.0.1:1", "tcp://[::1", "ucx://127.0.0.1:5"):
            work = gateway.work(prompt_of(20))
            gateway.expect(work, decode)
            asked = DecodeRequest(work, WorkerAddress(prefill.incarnation, (address,)))
            await gateway.ask(decode, asked, PATIENCE_S)
            assert (await gateway.ended(work, limit=PATIENCE_S)).reason == "prefill_lost"
        assert not decode.scheduler.sequences
        await gateway.until(lambda: len(decode.outbox) == 0, limit=PATIENCE_S)
