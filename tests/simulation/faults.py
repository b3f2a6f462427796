"""What befalls a cluster: a schedule of faults as plain values, drawn from a seed or by hypothesis, and its doing.

Each fault waits until it hits something: its victim is among those that a live request needs at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from checks import HANG_S
from clients import Call
from disturbances import live_attempts
from gateways import SimulatedGateway
from planes import STORM
from processes import run_as
from ranks import SimulatedRanks
from workload import MAX_PROMPT, ClientRequest, requests
from world import World

from kvferry.runtime import now
from kvferry.wire.beats import ExitNotice
from kvferry.wire.flow import Open
from kvferry.wire.messages import Codecs
from kvferry.wire.subjects import exit_subject
from kvferry.worker.worker import Worker

Kind = Literal[
    "kill", "kill_gateway", "freeze", "freeze_deaf", "freeze_gateway", "partition", "partition_in", "partition_out",
    "partition_gateway", "cut_off", "data_partition", "data_partition_one_way", "reset", "bus_restart", "bus_storm",
    "bad_frames", "mixed_up", "slow_disk", "lost_beats", "lost_gateway_beats", "slow_client", "leave", "burst",
    "lost_batches", "drain", "drain_gateway", "wedge", "kill_rank", "freeze_rank", "slow_rank",
]  # fmt: skip
Phase = Literal["queued", "computing", "held", "fetching", "running"]
STATES: dict[str, tuple[str, ...]] = {
    "queued": ("waiting", "opening"),
    "computing": ("computing",),
    "held": ("held",),
    "fetching": ("fetching",),
    "running": ("running",),
}
KINDS: tuple[Kind, ...] = get_args(Kind)
RANK_KINDS: tuple[Kind, ...] = ("kill_rank", "freeze_rank", "slow_rank")  # where there are workers with ranks
RANK_PERCENT = 30  # of the other faults: so many more
OFTEN: tuple[Kind, ...] = ("kill", "freeze_deaf", "bad_frames", "mixed_up", "mixed_up")  # drawn more than others
PHASES: tuple[Phase, ...] = get_args(Phase)
WEDGED_S = 6.0  # by then a worker has noticed that a step does not end
LOOK_S = 0.003  # how often a fault looks whether it can hit
PATIENCE_S = 1.5  # for its phase; then any will do
MAX_DELAY_S = 0.004  # of what is under way on the data plane
BURST = 5  # requests
NUM_BAD_FRAMES = 6


@dataclass(frozen=True)
class Fault:
    """`at`: seconds after the load began; `where`: picks the victim, from 0 to 1; `lasts`: until it is made good."""

    kind: Kind
    at: float
    where: float = 0.0
    lasts: float = 1.0
    phase: Phase = "running"


def drawn_faults(seed: int | str, count: int, seconds: float, *, ranks: bool = False) -> list[Fault]:
    """`ranks`: some more befall single ranks."""
    others = (*(kind for kind in KINDS if kind not in RANK_KINDS), *OFTEN)
    faults = _drawn(random.Random(f"faults {seed}"), others, count, seconds)
    if ranks:
        more = -(-count * RANK_PERCENT // 100)
        faults += _drawn(random.Random(f"faults of ranks {seed}"), RANK_KINDS, more, seconds)
    return sorted(faults, key=lambda fault: fault.at)


def _drawn(chance: random.Random, kinds: Sequence[Kind], count: int, seconds: float) -> list[Fault]:
    return [
        Fault(
            chance.choice(kinds),
            round(chance.uniform(0.1, seconds), 3),
            round(chance.random(), 3),
            round(chance.choice((0.1, 0.5, 1.0, 2.0)) * (1 + chance.random()), 3),
            chance.choice(PHASES),
        )
        for _ in range(count)
    ]


def dump(faults: Iterable[Fault]) -> str:
    return json.dumps([list(asdict(fault).values()) for fault in faults], separators=(",", ":"))


def load(text: str) -> list[Fault]:
    return [Fault(*values) for values in json.loads(text)]


class Saboteur:
    """Carries out a schedule. `hits`: the kinds of those faults that hit a live request."""

    def __init__(self, world: World, restart: Callable[[Worker[Any]], Awaitable[Any]]) -> None:
        """`restart` starts a worker like the one that it is given, with the same name."""
        self.hits: list[str] = []
        self.max_prompt = MAX_PROMPT
        self.forced = False  # requests of a burst tell their token ids
        self._world = world
        self._restart = restart
        self._codecs = Codecs()
        self._draining: dict[str, None] = {}
        self._next_number = 10_000  # of the requests that a burst makes

    async def carry_out(self, faults: Iterable[Fault]) -> None:
        """All of them, to their ends."""
        began = now()
        tasks = []
        for number, fault in enumerate(faults):
            await asyncio.sleep(max(0.0, began + fault.at - now()))
            tasks.append(self._world.spawn(self._one(fault), f"fault-{number}"))
        await asyncio.gather(*tasks)

    async def _one(self, fault: Fault) -> None:
        act: Callable[[Fault], Awaitable[bool]] = getattr(self, "_" + fault.kind)
        began = now()
        # Nothing is disturbed where no request lives any more.
        while any(call.outcome == "open" for call in self._world.calls) or now() - began < PATIENCE_S:
            if await act(fault if now() - began < PATIENCE_S else self._any_phase(fault)):
                self.hits.append(fault.kind)
                return
            await asyncio.sleep(LOOK_S)

    def _any_phase(self, fault: Fault) -> Fault:
        workers = [w for w in self._world.workers if fault.kind not in RANK_KINDS or self._ranks(w) is not None]
        victim = next((s for w in workers for s in w.scheduler.sequences.values()), None)
        if victim is None:
            return fault
        phase = next(phase for phase in PHASES if victim.state in STATES[phase])
        return replace(fault, phase=phase)

    # -- whom it hits ----------------------------------------------------------------------------------------

    def _needed(self, fault: Fault, role: str | None = None) -> Worker[Any] | None:
        """A worker that has a live request in the fault's phase; one with ranks for a fault of theirs."""
        states = STATES[fault.phase]
        live = {attempt.ticket for _, _, attempt in live_attempts(self._world)}
        found = [
            worker
            for worker in self._world.workers
            if role in (None, worker.role)
            and not self._disturbed(worker.settings.name)
            and (fault.kind not in RANK_KINDS or self._ranks(worker) is not None)
            and any(s.state in states and s.work.ticket in live for s in worker.scheduler.sequences.values())
        ]
        return _pick(found, fault.where)

    def _ranks(self, worker: Worker[Any]) -> SimulatedRanks | None:
        return self._world.runtime.ranks.get(worker.settings.name)

    def _busy_gateway(self, fault: Fault) -> SimulatedGateway | None:
        found = [
            core for core in self._world.cores if len(core.fleet.table) and not self._disturbed(core.name)
        ]  # fmt: skip
        return _pick(found, fault.where)

    def _disturbed(self, name: str) -> bool:
        broker = self._world.broker
        unreachable = name in broker.deaf or name in broker.mute
        hangs = self._world.referee.hangs(name)
        return unreachable or hangs or name in self._world.network._frozen or name in self._draining

    def _pair(self, fault: Fault) -> tuple[Worker[Any], Worker[Any]] | None:
        """Prefill and decode worker of a hand-off under way."""
        pairs: dict[tuple[str, str], tuple[Worker[Any], Worker[Any]]] = {}
        for _, _, attempt in live_attempts(self._world):
            if attempt.prefill is None or attempt.running:
                continue
            p, d = self._world.worker(attempt.prefill.name), self._world.worker(attempt.decode.name)
            if p is not None and d is not None:
                pairs[attempt.prefill.name, attempt.decode.name] = (p, d)
        return _pick(list(pairs.values()), fault.where)

    def _open_call(self, fault: Fault) -> Call | None:
        found = [call for call in self._world.calls if call.outcome == "open" and call.exchange and not call.has_left]
        return _pick(found, fault.where)

    # -- processes -------------------------------------------------------------------------------------------

    async def _kill(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        if victim is None:
            return False
        await self._world.kill(victim)
        if fault.where < 0.5:
            self._tell_of(victim)
        await asyncio.sleep(fault.lasts)
        await self._restart(victim)
        return True

    def _tell_of(self, victim: Worker[Any]) -> None:
        """As a supervisor does."""
        name, incarnation = victim.settings.name, victim.incarnation
        notice = self._codecs.beat.encode(ExitNotice(incarnation, "killed"))
        if self._world.broker.running:
            self._world.broker.send(0, exit_subject("dev", victim.role, name, incarnation), notice, "")

    async def _wedge(self, fault: Fault) -> bool:
        """A step does not end; the worker notices, says so, and its process ends."""
        victim = self._needed(fault)
        if victim is None or self._world.runtime.disks.get(victim.settings.name):
            return False
        name = victim.settings.name
        self._world.runtime.disks[name] = HANG_S / 0.01  # of which a lane takes a share
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WEDGED_S):
                await victim.wedged.wait()
        if victim in self._world.workers:
            await self._world.kill(victim)
            self._tell_of(victim)
        self._world.runtime.disks.pop(name, None)
        await asyncio.sleep(fault.lasts)
        if self._world.worker(name) is None:
            await self._restart(victim)
        return True

    # -- ranks -----------------------------------------------------------------------------------------------

    async def _kill_rank(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        if victim is None or (ranks := self._ranks(victim)) is None:
            return False
        await self._world.lose_rank(victim, _pick(ranks.numbers, fault.where))
        await self._ended(victim, fault)
        return True

    async def _freeze_rank(self, fault: Fault) -> bool:
        """Its worker's steps do not end meanwhile; if that takes too long the worker says so, and ends."""
        victim = self._needed(fault)
        if victim is None or (ranks := self._ranks(victim)) is None:
            return False
        world, name, rank = self._world, victim.settings.name, _pick(ranks.numbers, fault.where)
        world.log.record("freeze", name, rank)
        ranks.stop(rank)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * fault.lasts):
                await victim.wedged.wait()
        if victim.wedged.is_set():
            await world.kill(victim)
            await self._ended(victim, fault)
            return True
        world.log.record("thaw", name, rank)
        ranks.resume(rank)
        world.referee.thawed[name] = world.true_time
        return True

    async def _slow_rank(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        if victim is None or (ranks := self._ranks(victim)) is None:
            return False
        ranks.late_s = 0.02 + 0.3 * fault.where
        await asyncio.sleep(fault.lasts)
        ranks.late_s = 0.0
        self._world.referee.thawed[victim.settings.name] = self._world.true_time
        return True

    async def _ended(self, victim: Worker[Any], fault: Fault) -> None:
        """Its process has ended: the supervisor may say so, and starts it again."""
        if fault.where < 0.5:
            self._tell_of(victim)
        await asyncio.sleep(fault.lasts)
        if self._world.worker(victim.settings.name) is None:
            await self._restart(victim)

    # -- gateways --------------------------------------------------------------------------------------------

    async def _drain_gateway(self, fault: Fault) -> bool:
        """Requests under way get its grace time; then its clients ask another one."""
        core = self._busy_gateway(fault)
        if core is None or len(self._world.cores) < 2:
            return False
        self._draining[core.name] = None
        await self._world.drain_gateway(core)
        del self._draining[core.name]
        await asyncio.sleep(fault.lasts)
        await self._world.core(core.name, **core.settings)
        return True

    async def _drain(self, fault: Fault) -> bool:
        """As a rolling update does it."""
        victim = self._needed(fault)
        if victim is None or victim.state != "ready":
            return False
        world, name = self._world, victim.settings.name

        async def ending() -> None:
            await victim.drain()
            if victim in world.workers:
                world.workers.remove(victim)
                await victim.stop()

        self._draining[name] = None
        await run_as(name, ending())
        del self._draining[name]
        await asyncio.sleep(fault.lasts)
        if world.worker(name) is None:
            await self._restart(victim)
        return True

    async def _kill_gateway(self, fault: Fault) -> bool:
        core = self._busy_gateway(fault)
        if core is None:
            return False
        await self._world.kill_gateway(core)
        await asyncio.sleep(fault.lasts)
        await self._world.core(core.name, **core.settings)
        return True

    async def _freeze(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        return victim is not None and await self._frozen(victim.settings.name, fault.lasts, deaf=False)

    async def _freeze_deaf(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        return victim is not None and await self._frozen(victim.settings.name, fault.lasts, deaf=True)

    async def _freeze_gateway(self, fault: Fault) -> bool:
        core = self._busy_gateway(fault)
        return core is not None and await self._frozen(core.name, fault.lasts, deaf=False)

    async def _frozen(self, name: str, seconds: float, *, deaf: bool) -> bool:
        world = self._world
        world.freeze(name, deaf=deaf)
        await asyncio.sleep(seconds)
        if name in world.network._frozen:  # else it was killed meanwhile
            world.thaw(name)
        return True

    async def _slow_disk(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        if victim is None or self._world.runtime.disks.get(victim.settings.name):
            return False  # one at a time: the end of the first would end the other, or a hang
        name = victim.settings.name
        self._world.runtime.disks[name] = 0.02 + 0.3 * fault.where
        await asyncio.sleep(fault.lasts)
        self._world.runtime.disks.pop(name, None)
        self._world.referee.thawed[name] = self._world.true_time
        return True

    # -- the bus ---------------------------------------------------------------------------------------------

    async def _partition(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        return victim is not None and await self._severed(victim.settings.name, fault.lasts, ways="both")

    async def _partition_in(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        return victim is not None and await self._severed(victim.settings.name, fault.lasts, ways="in")

    async def _partition_out(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        return victim is not None and await self._severed(victim.settings.name, fault.lasts, ways="out")

    async def _partition_gateway(self, fault: Fault) -> bool:
        core = self._busy_gateway(fault)
        if core is None:
            return False
        return await self._severed(core.name, fault.lasts, ways=_pick(["both", "in", "out"], fault.where))

    async def _severed(self, name: str, seconds: float, ways: str) -> bool:
        """Messages are lost, and nobody is told."""
        broker = self._world.broker
        self._world.log.record("partition", name, ways)
        if ways != "out":
            broker.deaf[name] = None
        if ways != "in":
            broker.mute[name] = None
        await asyncio.sleep(seconds)
        broker.deaf.pop(name, None)
        broker.mute.pop(name, None)
        self._world.referee.note_bus_trouble()
        return True

    async def _cut_off(self, fault: Fault) -> bool:
        """A worker's connection to the bus breaks, and cannot be made again for a while."""
        victim = self._needed(fault)
        if victim is None:
            return False
        self._world.broker.cut(victim.bus)  # type: ignore[arg-type]
        await asyncio.sleep(fault.lasts)
        self._world.referee.note_bus_trouble()
        if victim in self._world.workers:
            self._world.broker.heal(victim.bus)  # type: ignore[arg-type]
        return True

    async def _bus_restart(self, fault: Fault) -> bool:
        broker = self._world.broker
        if not broker.running or not live_attempts(self._world):
            return False
        self._world.log.record("bus stops")
        broker.stop()
        await asyncio.sleep(fault.lasts)
        broker.restart()
        self._world.referee.note_bus_trouble()
        return True

    async def _bus_storm(self, fault: Fault) -> bool:
        broker = self._world.broker
        if not live_attempts(self._world) or broker.faults is STORM:
            return False
        before, broker.faults = broker.faults, STORM
        await asyncio.sleep(min(1.0, fault.lasts))
        broker.faults = before
        return True

    async def _lost_beats(self, fault: Fault) -> bool:
        victim = self._needed(fault)
        return victim is not None and await self._beatless(victim.settings.name, fault.lasts)

    async def _lost_gateway_beats(self, fault: Fault) -> bool:
        core = self._busy_gateway(fault)
        return core is not None and await self._beatless(core.name, fault.lasts)

    async def _beatless(self, name: str, seconds: float) -> bool:
        self._world.broker.beatless[name] = None
        await asyncio.sleep(seconds)
        self._world.broker.beatless.pop(name, None)
        return True

    async def _lost_batches(self, fault: Fault) -> bool:
        """For a moment no token of a decode worker gets through; often it is a stream's last one."""
        victim = self._needed(fault, "decode")
        if victim is None:
            return False
        self._world.broker.tokenless[victim.settings.name] = None
        await asyncio.sleep(0.1 * fault.lasts)
        self._world.broker.tokenless.pop(victim.settings.name, None)
        return True

    # -- the data plane --------------------------------------------------------------------------------------

    async def _data_partition(self, fault: Fault) -> bool:
        pair = self._pair(fault)
        return pair is not None and await self._blocked(pair, fault.lasts, one_way=False)

    async def _data_partition_one_way(self, fault: Fault) -> bool:
        pair = self._pair(fault)
        if pair is None:
            return False
        return await self._blocked(pair if fault.where < 0.5 else pair[::-1], fault.lasts, one_way=True)

    async def _blocked(self, pair: tuple[Worker[Any], Worker[Any]], seconds: float, *, one_way: bool) -> bool:
        here, there = (worker.settings.name for worker in pair)
        ways = ((here, there),) if one_way else ((here, there), (there, here))
        for way in ways:
            self._world.network.block(*way)
        await asyncio.sleep(seconds)
        for way in ways:
            self._world.network.unblock(*way)
        return True

    async def _reset(self, fault: Fault) -> bool:
        pair = self._pair(fault)
        if pair is None:
            return False
        self._world.log.record("reset", pair[0].settings.name, pair[1].settings.name)
        self._world.network.cut(pair[0].settings.name, pair[1].settings.name)
        return True

    async def _bad_frames(self, fault: Fault) -> bool:
        faults = self._world.network.faults
        if self._needed(replace(fault, phase="fetching"), "decode") is None:
            return False
        faults.next_wrong += 1 + int(fault.where * NUM_BAD_FRAMES)
        return True

    async def _mixed_up(self, fault: Fault) -> bool:
        """The next hand-off that can be is mixed up with another of as many tokens: P serves the wrong request."""
        world = self._world
        if world.network.mix_up is not None:
            return False
        mixed = asyncio.get_running_loop().create_future()

        def mix_up(process: str, message: Open) -> Open:
            worker = world.worker(process)
            if worker is None:
                return message
            sequences = worker.scheduler.sequences
            meant = sequences.get((message.ticket, message.attempt))
            if meant is None:
                return message
            others = [s for s in sequences.values() if s is not meant and s.num_context == meant.num_context]
            # Best one that is computed: its frames are here before anybody can say that they are not wanted.
            others = [s for s in others if s.state == "held"] or others
            if not others:
                return message
            other = _pick(others, fault.where)
            world.network.mix_up = None
            world.referee.took_memory(meant.key)  # D believes what P says of the other one
            world.log.record("mixed up", process)
            if not mixed.done():
                mixed.set_result(None)
            return Open(message.pull_id, *other.key)

        world.network.mix_up = mix_up
        await asyncio.wait((mixed,), timeout=3.0)
        if world.network.mix_up is mix_up:
            world.network.mix_up = None
        if not mixed.done():
            mixed.cancel()
            return False
        return True

    # -- clients and load ------------------------------------------------------------------------------------

    async def _slow_client(self, fault: Fault) -> bool:
        call = self._open_call(fault)
        if call is None or call.exchange is None:
            return False
        exchange = call.exchange
        call.pause()
        await asyncio.sleep(fault.lasts)
        exchange.resume()
        return True

    async def _leave(self, fault: Fault) -> bool:
        call = self._open_call(fault)
        if call is None:
            return False
        call.leave()
        return True

    async def _burst(self, fault: Fault) -> bool:
        """Long requests, all at once: the pools are full."""
        if not live_attempts(self._world):
            return False
        for plain in requests(int(fault.where * 1000), BURST, seconds=0.0, max_prompt=self.max_prompt):
            prompt = (plain.prompt * self.max_prompt)[: self.max_prompt - 10 * (plain.number + 1)]
            self._world.open(self._numbered(plain, prompt))
        return True

    def _numbered(self, plain: ClientRequest, prompt: tuple[int, ...]) -> ClientRequest:
        self._next_number += 1
        return replace(plain, number=self._next_number, prompt=prompt, wants_ids=self.forced)


def _pick(found: list[Any], where: float) -> Any:
    return found[min(int(where * len(found)), len(found) - 1)] if found else None
