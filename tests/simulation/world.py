"""A whole cluster with real gateways in one process: everything that happens follows from one seed."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog
from answers import Check, ExactCheck
from checks import CheckedSlots, Referee
from clients import CLIENTS, Call
from cluster import Cluster, all_free, settled
from gateways import SimulatedGateway
from lanes import ProcessRuntime
from memory_ranks import ranked_memory
from planes import SimulatedBroker, SimulatedBus, SimulatedNetwork
from processes import MachineClock, ProcessLoop, acting_as, run_as
from ranks import SimulatedRanks
from tiny import compiler
from virtual_loop import Deadlock, EventLog, VirtualTimeout
from workload import MODEL, MODEL_NAME, ClientRequest

from kvferry.bus.base import BusSettings
from kvferry.engine.memory.runner import MemoryRunner, MemorySettings
from kvferry.errors import RankLost
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.runtime import TaskSet, now
from kvferry.schedule.step import ModelRunner
from kvferry.wire.subjects import inbox_prefix
from kvferry.worker.settings import WorkerSettings
from kvferry.worker.worker import Worker
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.worker import PrefillWorker

LIMIT_S = 300.0  # virtual seconds of one scenario
END_CONFIRMED_S = 5.0  # for the last words between gateways and workers, bus faults among them
RESTART_S = 0.1
RANK_LOST_S = 0.01
WEDGED = "wedged: no engine step ended"
SLOT_PAYLOAD_BYTES = 8 << 10  # small: a prompt is many frames

T = TypeVar("T")


class World(Cluster):
    """Workers, gateways and clients of one scenario."""

    runtime: ProcessRuntime

    def __init__(self, seed: int, log: EventLog) -> None:
        self.log = log
        self.failures: list[str] = []
        self.cores: list[SimulatedGateway] = []
        self.calls: list[Call] = []
        self.num_slots = 8
        self.model_names = (MODEL_NAME,)  # that the gateways serve
        self.make_checks: Callable[[ClientRequest], list[Check]] = exact_checks
        self._num_begun = 0  # exchanges, to give the gateways turns
        self._progress = asyncio.Event()
        self._tasks = TaskSet(lambda task, error: self.failures.append(f"{task}: {error!r}"))
        super().__init__(runtime=ProcessRuntime(seed))

    def __post_init__(self) -> None:
        self.broker = SimulatedBroker(self.runtime, self.log)
        self.network = SimulatedNetwork(self.runtime, self.log)
        self.referee = Referee(self)

    @property
    def true_time(self) -> float:
        with acting_as(None):
            return now()

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
        await self.acquainted()

    async def acquainted(self) -> None:
        """Until every gateway knows every worker."""
        await settled(lambda: all(len(c.fleet.registry) == len(self.workers) for c in self.cores), within=5.0)

    def skew(self, *names: str) -> None:
        """Give processes clocks of their own: up to a quarter of an hour apart, up to 0.1 % fast or slow."""
        uniform = self.runtime.uniform
        for name in names:
            process_loop().clocks[name] = MachineClock(900.0 * uniform(), 1.0 + 0.002 * (uniform() - 0.5))

    async def prefill(self, name: str = "prefill-0", model: MemorySettings = MODEL, **settings: Any) -> PrefillWorker:
        return await self._begin(name, super().prefill(name, model, debug_digests=False, **settings))

    async def decode(self, name: str = "decode-0", model: MemorySettings = MODEL, **settings: Any) -> DecodeWorker:
        return await self._begin(name, super().decode(name, model, debug_digests=False, **settings))

    async def core(self, name: str, **settings: Any) -> SimulatedGateway:
        core = SimulatedGateway(self, name, **settings)
        await self._begin(name, core.start())
        self.referee.watch_gateway(core)
        self.cores.append(core)
        self.changed()
        return core

    async def _begin(self, name: str, start: Coroutine[Any, Any, T]) -> T:
        """Without the bus a process ends at its start, and its supervisor starts it again."""

        async def begin() -> T:
            await self._bus_is_up()  # it may have gone in this very turn
            return await start

        await self._bus_is_up()
        return await run_as(name, begin())

    async def _bus_is_up(self) -> None:
        while not self.broker.running:
            await asyncio.sleep(RESTART_S)

    def _grammars(self, model: MemorySettings) -> GrammarCompiler:
        return compiler()

    def _runner(self, settings: WorkerSettings, model: MemorySettings) -> ModelRunner:
        size = settings.tensor_parallel_size
        if size == 1:
            return MemoryRunner(model)
        ranks = self.runtime.ranks[settings.name] = SimulatedRanks()
        return ranked_memory(model, size, ranks.connect, settings.remote_ranks)

    def _slots(self) -> CheckedSlots:
        return CheckedSlots(self.num_slots, SLOT_PAYLOAD_BYTES, self.referee)

    async def _start(self, worker: Worker[Any]) -> None:
        self.referee.watch(worker)
        await super()._start(worker)

    def bus(self, name: str, role: str) -> SimulatedBus:
        settings = BusSettings("memory://", name, inbox_prefix("dev", role))
        return SimulatedBus(self.broker, settings, self.runtime)

    def worker(self, name: str) -> Worker[Any] | None:
        """The living worker of a name."""
        return next((worker for worker in self.workers if worker.settings.name == name), None)

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
        self.referee.thawed[name] = self.true_time
        process_loop().thaw(name)
        self.network.thaw(name)

    async def kill(self, worker: Worker[Any]) -> None:
        name = worker.settings.name
        self.log.record("kill", name)
        self.broker.cut(worker.bus)  # type: ignore[arg-type]
        if process_loop().is_frozen(name):
            self.thaw(name)
        self.runtime.kill_lanes(name)
        await super().kill(worker)

    async def lose_rank(self, worker: Worker[Any], rank: int) -> None:
        """One of a worker's ranks is killed. The worker's process hears it a moment later, and ends."""
        name = worker.settings.name
        self.log.record("kill", name, rank)
        self.runtime.ranks[name].kill(rank)
        await asyncio.sleep(RANK_LOST_S * self.runtime.uniform())
        if worker in self.workers:
            await self.kill(worker)

    async def kill_gateway(self, core: SimulatedGateway) -> None:
        self.log.record("kill", core.name)
        self.cores.remove(core)
        self.referee.gateway_died(core)
        self.broker.cut(core.bus)
        if process_loop().is_frozen(core.name):
            self.thaw(core.name)
        self.runtime.kill_lanes(core.name)
        await core.die()

    async def drain_gateway(self, core: SimulatedGateway) -> None:
        """As SIGTERM does."""
        self.log.record("drain", core.name)
        await run_as(core.name, core.gateway.completions.drain(core.settings.get("drain_grace", 20.0)))
        self.cores.remove(core)
        await run_as(core.name, core.finish_answers())
        await run_as(core.name, core.stop())
        core.alive = False

    async def stop(self) -> None:
        await settled(lambda: all(informed(core, w) for core in self.cores for w in self.workers), END_CONFIRMED_S)
        for core in self.cores:
            for placer in core.fleet.placers.values():
                placer.snapshot.index.check_integrity()
            await core.stop()
        await super().stop()
        assert not self.network.links, "connections left"
        assert not self.broker._attachments, "subscriptions left"
        assert len(self._tasks) == 0

    # -- clients ---------------------------------------------------------------------------------------------

    async def offer(self, requests: list[ClientRequest]) -> None:
        """Open every call at its time, the gateways in turn."""
        began = now()
        for request in requests:
            await asyncio.sleep(began + request.arrival - now())
            self.open(request)

    def open(self, request: ClientRequest) -> Call:
        call = Call(request, self.make_checks)
        self.calls.append(call)
        with acting_as(CLIENTS):
            self._tasks.spawn(self._serve(call), f"call-{request.number}")
        return call

    async def _serve(self, call: Call) -> None:
        outcome = "failed"
        try:
            outcome = await call.serve(self._next_gateway)
        finally:
            self.log.record("call", call.request.number, outcome, call.num_events)
            call.outcome = outcome
            self.changed()

    async def _next_gateway(self) -> SimulatedGateway:
        while not self.cores:
            await self._news()
        self._num_begun += 1
        return self.cores[self._num_begun % len(self.cores)]

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return self._tasks.spawn(coroutine, name)

    def changed(self) -> None:
        self._progress.set()

    async def _news(self) -> None:
        self._progress.clear()
        await self._progress.wait()
        if self.referee.violation is not None:
            raise self.referee.violation

    async def all_over(self) -> None:
        while any(call.outcome == "open" for call in self.calls):
            await self._news()

    async def quiet(self) -> None:
        """Until no worker holds or remembers anything; soon after the last call is over."""
        await settled(lambda: all_free(*self.workers) and not any(map(remembers, self.workers)), END_CONFIRMED_S)

    def unfinished(self) -> str:
        """Who still waits, and for what."""
        calls = [call.request.number for call in self.calls if call.outcome == "open"]
        held = {
            worker.settings.name: {s.work.request_id: s.state for s in worker.scheduler.sequences.values()}
            for worker in self.workers
            if worker.scheduler.sequences
        }
        return f"open requests {calls}, sequences {held}, failures {self.failures}"

    def check_sound(self) -> None:
        """So far no rule is broken, no task has failed, no client has seen anything wrong."""
        if self.referee.violation is not None:
            raise self.referee.violation
        wrong = [call.wrong for call in self.calls if call.wrong]
        assert not wrong, wrong
        assert not self.failures, self.failures


def exact_checks(request: ClientRequest) -> list[Check]:
    return [ExactCheck(expected) for expected in request.expected]


def total(world: World, name: str, **labels: str) -> float:
    """The sum of a metric over all workers that live."""
    return sum(worker.metrics.value(name, **labels) for worker in world.workers)


def seen(world: World, name: str, **labels: str) -> float:
    """The sum of a metric over all gateways that live."""
    return sum(core.fleet.metrics.value(name, **labels) for core in world.cores)


def remembers(worker: Worker[Any]) -> bool:
    return bool(worker.scheduler.sequences) or len(worker.outbox) > 0


def informed(core: SimulatedGateway, worker: Worker[Any]) -> bool:
    """Whether a gateway knows just what a worker's prefix cache has."""
    known = core.fleet.placers[worker.model_name].snapshot.index.num_blocks(worker.incarnation)
    return known == len(worker.scheduler.memory.pool.findable())


def process_loop() -> ProcessLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ProcessLoop)
    return loop


def check_answered(calls: list[Call]) -> None:
    """Every call got exactly its answer; the check of what it saw has been made as it came."""
    for call in calls:
        assert not call.wrong, call.wrong
        assert call.outcome == "ok", f"request {call.request.number}: {call.outcome}"


Scenario = Callable[[World], Awaitable[None]]


def simulate(seed: int, scenario: Scenario, *, limit: float = LIMIT_S) -> EventLog:
    """Run a scenario, and its end: all calls over, every worker clean, every table empty, no task left or failed."""
    loop = ProcessLoop(limit)
    log = EventLog(loop.time)
    unhandled: list[str] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(repr(context)))

    async def run(world: World) -> None:
        await scenario(world)
        await world.all_over()
        world.check_sound()
        await world.quiet()
        await world.stop()
        world.check_sound()
        left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks left: {left}"

    async def body() -> None:
        world = World(seed, log)
        worlds.append(world)
        try:
            await run(world)
        except BaseException as error:
            failed.append(error)
            raise

    worlds: list[World] = []
    failed: list[BaseException] = []
    with errors_collected() as errors:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                try:
                    runner.run(body())
                except VirtualTimeout as timeout:
                    raise VirtualTimeout(f"{timeout}; {worlds[0].unfinished()}") from None
        except (Exception, asyncio.CancelledError) as error:
            _say_more(error, failed, worlds, errors)
            raise
    assert not errors, errors
    assert not unhandled, unhandled
    return log


def _say_more(
    error: BaseException, failed: list[BaseException], worlds: list[World], errors: list[MutableMapping[str, Any]]
) -> None:
    """Raise the failure that explains the others, if there is one."""
    for world in worlds:
        if world.referee.violation is not None:
            raise world.referee.violation from error
    if isinstance(error, Deadlock) and failed:
        # Where a scenario fails, receives may be left that no cancel ends: its own error says more.
        raise failed[0] from None
    if errors:
        raise AssertionError(f"{error!r} after {errors}") from error


@contextmanager
def errors_collected() -> Iterator[list[MutableMapping[str, Any]]]:
    """Lines that the code logs as errors; all others are not even made."""
    lines: list[MutableMapping[str, Any]] = []

    def keep(_: object, __: str, line: MutableMapping[str, Any]) -> Any:
        # Only where a fault wants it, as the referee sees to; or a rank was killed.
        if line["event"] != WEDGED and not isinstance(sys.exc_info()[1], RankLost):
            lines.append(line)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        yield lines
    finally:
        structlog.configure(**before)
