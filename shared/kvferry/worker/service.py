"""One worker process, from settings to exit: load, warm up, join, serve, drain."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

from kvferry import ready
from kvferry.advertise import advertised_host
from kvferry.bus.base import least_payload
from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.errors import RankLost, SettingError
from kvferry.log import get_logger
from kvferry.runtime import Runtime, SystemRuntime, now, stop_signals
from kvferry.trace.factory import open_exporter
from kvferry.trace.span import SpanExporter
from kvferry.transport.base import TransportSettings
from kvferry.transport.factory import open_transport
from kvferry.transport.slots import SlotPool
from kvferry.worker.debug import DebugServer
from kvferry.worker.engine import Loaded, load_engine, warm_up
from kvferry.worker.handoff.orders import Begin
from kvferry.worker.parts import Parts
from kvferry.worker.ranks import RankProcesses, ranks_of
from kvferry.worker.settings import WorkerSettings
from kvferry.worker.worker import Worker

log = get_logger(__name__)
EXIT_WEDGED = 70
MakeWorker = Callable[[Any, Parts], Worker[Any]]


async def serve_worker(settings: WorkerSettings, make_worker: MakeWorker) -> None:
    """Run one worker until SIGTERM, SIGINT, a Drain message, or a wedged engine.

    Raises `SettingError`, `CheckpointError`, `BusUnavailable` or `TransportUnavailable` if it cannot start.
    """
    _pin(settings.cpus)
    runtime = SystemRuntime()
    spans = open_exporter(settings, runtime)
    incarnation = runtime.random_u64()
    debug = DebugServer(settings.host, settings.debug_port)
    with stop_signals(asyncio.get_running_loop()) as stop, ranks_of(settings, runtime) as ranks:
        began = now()
        loading = runtime.lane("load")
        loaded = await _unless(stop, loading.run(load_engine, settings, ranks.joined), ranks.give_up)
        if loaded is not None:
            ranks.watch()
            await loading.run(warm_up, loaded)
        loading.close()
        if loaded is None:
            return
        runner = loaded.runner
        log.info("model ready", seconds=round(now() - began, 2), blocks=runner.num_blocks, numerics=runner.numerics_id)
        worker = make_worker(settings, await _parts(settings, runtime, incarnation, loaded, ranks, spans))
        worker.debug_port = debug.port
        await worker.transport.start(worker.attach)
        await worker.start()
        await debug.start(worker)
        ready.report("ready", incarnation=incarnation)
        log.info("serving", incarnation=f"{incarnation:016x}", transport=worker.transport.scheme, debug_port=debug.port)
        await _first(stop, worker.draining, worker.wedged)
        if worker.wedged.is_set():
            # The engine thread may never return: nothing can be waited for.
            log.error("wedged: exiting")
            os._exit(EXIT_WEDGED)
        await worker.drain()
        await debug.stop()
        await worker.stop()
        runner.close()


async def _parts(
    settings: WorkerSettings,
    runtime: Runtime,
    incarnation: int,
    loaded: Loaded,
    ranks: RankProcesses,
    spans: SpanExporter | None,
) -> Parts:
    transport = open_transport(
        settings.transport,
        TransportSettings(
            incarnation=incarnation,
            data_key=settings.data_key_bytes,
            host=settings.host,
            advertise_host=advertised_host(settings.advertise_host, settings.nats_url),
            port=settings.data_port,
            net_devices=settings.ucx_net_devices,
        ),
        runtime,
    )
    shards = await ranks.shards()
    begin = Begin(settings.role == "prefill", incarnation, transport.scheme, settings.num_slots, settings.slot_kb << 10)
    await asyncio.gather(*(shard.begin(begin) for shard in shards))
    min_payload = least_payload(loaded.runner.max_model_len)
    bus = NatsBus(bus_login(settings, settings.role, settings.name, min_payload), runtime)
    await bus.start()
    return Parts(
        runtime=runtime,
        bus=bus,
        transport=transport,
        slots=SlotPool(settings.num_slots, settings.slot_kb << 10),
        runner=loaded.runner,
        shards=shards,
        incarnation=incarnation,
        model_name=settings.source.served_name,
        pid=os.getpid(),
        engine=loaded.choice.engine,
        engine_reason=loaded.choice.why,
        grammars=loaded.grammars,
        vocabulary_id=loaded.vocabulary_id,
        spans=spans,
    )


def _pin(cpus: str) -> None:
    """Keep this process on the given cores, as `0,2` or `0-3`."""
    if not cpus:
        return
    if sys.platform != "linux":
        raise SettingError("--cpus", "pinning needs Linux")
    try:
        cores: set[int] = set()
        for part in cpus.split(","):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
        os.sched_setaffinity(0, cores)
    except (ValueError, OSError):
        raise SettingError("--cpus", f"{cpus!r} does not name cores of this machine") from None


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _unless(stop: asyncio.Event, awaitable: Any, give_up: Callable[[], None]) -> Loaded | None:
    """The engine, or None when a signal came while it was loading. `give_up` ends its wait for other hosts."""
    loading = asyncio.ensure_future(awaitable)
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        give_up()
        await asyncio.wait((loading,))  # a load cannot be interrupted; it takes seconds
    if stop.is_set() and isinstance(loading.exception(), RankLost):
        return None
    loaded: Loaded = loading.result()
    return None if stop.is_set() else loaded
