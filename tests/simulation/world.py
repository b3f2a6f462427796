"""A whole cluster with real gateways in one process: everything that happens follows from one seed."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from cluster import Cluster, SimulationRuntime, all_free, settled
from gateway_core import Call, GatewayCore
from planes import SimulatedBroker, SimulatedBus, SimulatedNetwork
from processes import ProcessLoop, run_as
from scripted_worker import text_of, write_model
from virtual_loop import Deadlock, EventLog
from workload import MODEL, ClientRequest

from kvferry.bus.base import BusSettings
from kvferry.engine.memory import MemorySettings
from kvferry.runtime import now
from kvferry.text.detokenizer import TokenTexts
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.subjects import inbox_prefix
from kvferry.worker.worker import Worker
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.worker import PrefillWorker

LIMIT_S = 300.0  # virtual seconds of one scenario
END_CONFIRMED_S = 5.0  # for the last words between gateways and workers, bus faults among them


class World(Cluster):
    """Workers and gateways of one scenario."""

    runtime: SimulationRuntime

    def __init__(self, seed: int, log: EventLog) -> None:
        self.log = log
        self.failures: list[str] = []
        self.cores: list[GatewayCore] = []
        self.calls: list[Call] = []
        self._progress = asyncio.Event()
        super().__init__(runtime=SimulationRuntime(seed))

    def __post_init__(self) -> None:
        self.broker = SimulatedBroker(self.runtime, self.log)
        self.network = SimulatedNetwork(self.runtime, self.log)

    # -- processes -------------------------------------------------------------------------------------------

    async def start(self, *, prefill: int, decode: int, gateways: int = 1, **settings: Any) -> None:
        """`settings` go to every worker, those that begin with `gateway_` to the gateways."""
        own = {name.removeprefix("gateway_"): settings.pop(name) for name in list(settings) if name[:8] == "gateway_"}
        for number in range(prefill):
            await self.prefill(f"prefill-{number}", **settings)
        for number in range(decode):
            await self.decode(f"decode-{number}", **settings)
        for number in range(gateways):
            await self.core(f"gateway-{number}", **own)
        await settled(lambda: all(len(c.fleet.registry) == prefill + decode for c in self.cores), within=5.0)

    async def prefill(self, name: str = "prefill-0", model: MemorySettings = MODEL, **settings: Any) -> PrefillWorker:
        return await run_as(name, super().prefill(name, model, debug_digests=False, **settings))

    async def decode(self, name: str = "decode-0", model: MemorySettings = MODEL, **settings: Any) -> DecodeWorker:
        return await run_as(name, super().decode(name, model, debug_digests=False, **settings))

    async def core(self, name: str, **settings: Any) -> GatewayCore:
        async def start() -> GatewayCore:
            core = GatewayCore(self, name, token_texts(), **settings)
            await core.start()
            return core

        core = await run_as(name, start())
        self.cores.append(core)
        return core

    def bus(self, name: str, role: str) -> SimulatedBus:
        settings = BusSettings("memory://", name, inbox_prefix("dev", role))
        return SimulatedBus(self.broker, settings, self.runtime)

    def freeze(self, name: str, *, deaf: bool = False) -> None:
        """As SIGSTOP does. What comes on the bus waits for it, unless it is `deaf`: then the server drops it."""
        self.log.record("freeze", name)
        if deaf:
            self.broker.deaf[name] = None
        self.network.freeze(name)
        process_loop().freeze(name)

    def thaw(self, name: str) -> None:
        """As SIGCONT does."""
        self.log.record("thaw", name)
        self.broker.deaf.pop(name, None)
        process_loop().thaw(name)
        self.network.thaw(name)

    async def kill(self, worker: Worker[Any]) -> None:
        self.log.record("kill", worker.settings.name)
        await super().kill(worker)

    async def kill_gateway(self, core: GatewayCore) -> None:
        self.log.record("kill", core.name)
        self.cores.remove(core)
        await core.die()

    async def stop(self) -> None:
        await settled(lambda: all(informed(core, w) for core in self.cores for w in self.workers), END_CONFIRMED_S)
        for core in self.cores:
            core.fleet.placer.snapshot.index.check_integrity()
            await core.stop()
        await super().stop()

    # -- clients ---------------------------------------------------------------------------------------------

    async def offer(self, requests: list[ClientRequest]) -> None:
        """Open every call at its time, the gateways in turn."""
        began = now()
        for request in requests:
            await asyncio.sleep(began + request.arrival - now())
            living = self.cores
            core = living[request.number % len(living)]

            async def open_call(core: GatewayCore = core, request: ClientRequest = request) -> Call:
                return core.open(request)

            self.calls.append(await run_as(core.name, open_call()))

    def changed(self) -> None:
        self._progress.set()

    async def all_over(self) -> None:
        while any(call.outcome == "open" for call in self.calls):
            self._progress.clear()
            await self._progress.wait()

    async def quiet(self) -> None:
        """Until no worker holds or remembers anything; soon after the last call is over."""
        await settled(lambda: all_free(*self.workers) and not any(map(remembers, self.workers)), END_CONFIRMED_S)


def remembers(worker: Worker[Any]) -> bool:
    return bool(worker.scheduler.sequences) or len(worker.outbox) > 0


def informed(core: GatewayCore, worker: Worker[Any]) -> bool:
    """Whether a gateway knows just what a worker's prefix cache has."""
    known = core.fleet.placer.snapshot.index.num_blocks(worker.incarnation)
    return known == len(worker.scheduler.memory.pool.findable())


def process_loop() -> ProcessLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ProcessLoop)
    return loop


def check_exact(calls: list[Call]) -> None:
    """Every call got exactly its tokens, and its client exactly their text."""
    for call in calls:
        number, answer = call.request.number, call.request.answer()
        assert call.outcome in ("stop", "length"), f"request {number}: {call.outcome}"
        assert call.tokens == answer, f"request {number} got {call.tokens} instead of {answer}"
        assert call.client.text == text_of(answer), f"request {number}: the client's text"


def check_prefix(call: Call) -> None:
    """A call that was cut off has seen nothing wrong."""
    answer = call.request.answer()
    assert call.tokens == answer[: len(call.tokens)], f"request {call.request.number}"
    assert text_of(answer).startswith(call.client.text.rstrip("\ufffd"))


Scenario = Callable[[World], Awaitable[None]]


def simulate(seed: int, scenario: Scenario) -> EventLog:
    """Run a scenario, and its end: all calls over, every worker clean, every table empty, no task left or failed."""
    loop = ProcessLoop(LIMIT_S)
    log = EventLog(loop.time)

    async def run() -> None:
        world = World(seed, log)
        await scenario(world)
        await world.all_over()
        await world.quiet()
        await world.stop()
        assert not world.failures, world.failures
        left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks left: {left}"

    async def body() -> None:
        try:
            await run()
        except BaseException as error:
            failed.append(error)
            raise

    failed: list[BaseException] = []
    with errors_collected() as errors:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(body())
        except Deadlock as deadlock:
            # Where a scenario fails, receives may be left that no cancel ends: its own error says more.
            raise (failed or [deadlock])[0] from None
    assert not errors, errors
    return log


@contextmanager
def errors_collected() -> Iterator[list[MutableMapping[str, Any]]]:
    """Lines that the code logs as errors; all others are not even made."""
    lines: list[MutableMapping[str, Any]] = []

    def keep(_: object, __: str, line: MutableMapping[str, Any]) -> Any:
        lines.append(line)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        yield lines
    finally:
        structlog.configure(**before)


@cache
def token_texts() -> TokenTexts:
    with tempfile.TemporaryDirectory() as directory:
        return TokenTexts(Tokenizer(write_model(Path(directory))))
