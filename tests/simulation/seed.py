"""One seed: a cluster, its load and its faults, all drawn from one number.

    python tests/simulation seed 1234              the seed
    python tests/simulation seed 1234 --faults …   with another schedule of faults

Prints the digest of all that happened. What fails prints the command that makes it happen again, exactly.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from answers import Check, ForcedCheck
from cluster import settled
from faults import MAX_DELAY_S, Fault, drawn_faults, dump
from planes import NOISE
from saboteur import Saboteur
from virtual_loop import EventLog
from workload import MODEL, ClientRequest, mixed_requests
from world import World, check_answered, seen, simulate

from kvferry.bus.memory import Faults
from kvferry.engine.memory.runner import MemorySettings
from kvferry.worker.worker import Worker

NUM_REQUESTS = 44
NUM_FAULTS = 14
# A seed that comes to less than the least of everything goes on, in rounds; one in a hundred takes more than six.
MAX_ROUNDS = 40
ROUND_REQUESTS = 8
ROUND_FAULTS = 3
ROUND_S = 1.5
MIN_HITS = 8
MIN_REQUESTS = 40
MIN_STEPS = 1500
LOAD_S = 7.0  # in which requests arrive
FAULTS_S = 6.0  # in which faults begin
LIMIT_S = 400.0  # virtual
TIGHT_BLOCKS = 40
RANKED_SHARE = 0.35


@dataclass(frozen=True)
class Story:
    """What a seed came to."""

    digest: str
    num_requests: int
    num_steps: int
    hits: tuple[str, ...]
    outcomes: tuple[str, ...]
    cpu_s: float

    @property
    def is_rich(self) -> bool:
        return self.num_requests >= MIN_REQUESTS and self.num_steps >= MIN_STEPS and len(self.hits) >= MIN_HITS


class FailedSeed(AssertionError):
    """Says what went wrong and how to see it again."""


@dataclass(frozen=True)
class Setting:
    """A cluster, drawn from a seed."""

    num_prefill: int
    num_decode: int
    num_slots: int
    tight: bool  # pools that hold two or three requests
    fast: bool  # workers of two numerics, and `fast`
    bus: Faults
    corruption: float
    max_delay: float
    workers: dict[str, Any]
    prefill: dict[str, Any]
    decode: dict[str, Any]
    gateways: dict[str, Any]
    degrees: dict[str, int]  # ranks of each worker that has several
    remote: dict[str, int]  # how many of these are on other hosts, where any is

    @property
    def max_prompt(self) -> int:
        return 300 if self.tight else 400

    @property
    def long_tokens(self) -> int:
        return 250 if self.tight else 500

    def model(self, number: int) -> MemorySettings:
        model = replace(MODEL, num_blocks=TIGHT_BLOCKS) if self.tight else MODEL
        return replace(model, draws=("-a", "-b")[number % 2]) if self.fast else model


def drawn_setting(seed: int) -> Setting:
    chance = random.Random(f"setting {seed}")
    fast = chance.random() < 0.2
    return Setting(
        num_prefill=chance.randint(2, 3),
        num_decode=chance.randint(2, 3),
        num_slots=chance.choice((3, 8)),
        tight=chance.random() < 0.3,
        fast=fast,
        bus=chance.choice((Faults(), NOISE, replace(NOISE, loss=0.0))),
        corruption=chance.choice((0.0, 0.01, 0.03)),
        max_delay=chance.choice((0.0, MAX_DELAY_S)),
        workers={
            "max_waiting": chance.choice((6, 256)),
            "overtake_ms": chance.choice((50, 500)),
            "drain_grace": chance.choice((2.0, 20.0)),
            "bus_grace": chance.choice((2.0, 30.0)),
            "step_timeout": 3.0,
            **({"exactness": "fast"} if fast else {}),
        },
        prefill={"lease_s": chance.choice((1.0, 30.0)), "max_num_batched_tokens": chance.choice((64, 512))},
        decode={
            "max_num_seqs": chance.choice((2, 3, 5)),
            "max_num_batched_tokens": chance.choice((48, 256)),
            "pull_stall": chance.choice((0.5, 2.0)),
            "pull_deadline": chance.choice((3.0, 60.0)),
            "pull_share": chance.choice((0.25, 1.0)),
            "reserve_lead": chance.choice((0.0, 0.7)),
        },
        gateways={
            # Many faults may meet in one request; that it ends after some is shown elsewhere.
            "failure_budget": 100,
            "max_backlog_bytes": chance.choice((3000, 1 << 16)),
            "drain_grace": 1.0,
            "local_prefill_threshold": chance.choice((0, 32, 128)),
        },
        degrees=drawn_degrees(seed),
        remote=drawn_remote(seed),
    )


def drawn_degrees(seed: int) -> dict[str, int]:
    """Of one in three seeds: workers of 1, 2 and 3 ranks, where the third one shares a KV head."""
    chance = random.Random(f"degrees {seed}")
    if chance.random() >= RANKED_SHARE:
        return {}
    names = [f"{role}-{number}" for role in ("prefill", "decode") for number in range(3)]
    drawn = {name: chance.choice((1, 2, 2, 3)) for name in names}
    return {name: ranks for name, ranks in drawn.items() if ranks > 1}


def drawn_remote(seed: int) -> dict[str, int]:
    """Of half the workers with ranks: some of them on other hosts, as shards with a data plane of their own."""
    chance = random.Random(f"remote {seed}")
    drawn = {name: chance.choice((0, chance.randrange(1, ranks))) for name, ranks in drawn_degrees(seed).items()}
    return {name: ranks for name, ranks in drawn.items() if ranks}


class Play:
    """A seed's scenario."""

    def __init__(self, seed: int, faults: Sequence[Fault] | None = None, num_requests: int = NUM_REQUESTS) -> None:
        self.seed = seed
        self.setting = drawn_setting(seed)
        self.faults = self._drawn_faults(seed, NUM_FAULTS, FAULTS_S) if faults is None else list(faults)
        self.goes_on = faults is None
        self.requests = self._drawn_requests(seed, num_requests, LOAD_S * num_requests / NUM_REQUESTS, 0)
        self.hits: list[str] = []
        self.num_steps = 0
        self.outcomes: list[str] = []

    async def __call__(self, world: World) -> None:
        setting = self.setting
        world.num_slots = setting.num_slots
        if setting.fast:
            world.make_checks = self._forced_checks
        await self._start(world)
        world.broker.faults = setting.bus
        world.network.faults.corruption = setting.corruption
        world.network.max_delay = setting.max_delay
        saboteur = Saboteur(world, lambda worker: self._start_worker(world, worker.role, worker.settings.name))
        saboteur.load.max_prompt = setting.max_prompt
        saboteur.load.forced = setting.fast
        await self._round(world, saboteur, self.requests, self.faults)
        for number in range(1, MAX_ROUNDS if self.goes_on else 0):
            if len(saboteur.hits) >= MIN_HITS and world.referee.num_steps >= MIN_STEPS:
                break
            chance = f"{self.seed} {number}"
            await self._round(
                world,
                saboteur,
                self._drawn_requests(chance, ROUND_REQUESTS, ROUND_S, ROUND_REQUESTS * number + NUM_REQUESTS),
                self._drawn_faults(chance, ROUND_FAULTS, ROUND_S),
            )
        self.hits = saboteur.hits
        self.num_steps = world.referee.num_steps
        self.outcomes = [call.outcome for call in world.calls]
        world.check_sound()
        # A client that read too slowly may have been cut off.
        staying = [call for call in world.calls if not call.has_left]
        check_answered([call for call in staying if not (call.has_paused and call.outcome == "cut off")])
        world.broker.faults = Faults()
        # Those that were judged gone have to be heard again before the last words can be exchanged.
        await settled(lambda: all(len(c.fleet.registry) == len(world.workers) for c in world.cores), within=10.0)
        mismatches = seen(world, "kvferry_token_mismatch_total")
        assert mismatches == 0, f"{mismatches} tokens came twice, and not the same"

    async def _round(
        self, world: World, saboteur: Saboteur, requests: list[ClientRequest], faults: Sequence[Fault]
    ) -> None:
        offering = world.spawn(world.offer(requests), "offer")
        sabotage = world.spawn(saboteur.carry_out(faults), "sabotage")
        await offering
        await world.all_over()
        await sabotage
        await world.all_over()

    def _drawn_faults(self, chance: int | str, count: int, seconds: float) -> list[Fault]:
        return drawn_faults(chance, count, seconds, ranks=bool(self.setting.degrees))

    def _drawn_requests(self, chance: int | str, count: int, seconds: float, first: int) -> list[ClientRequest]:
        setting = self.setting
        drawn = mixed_requests(
            chance, count, seconds=seconds, max_prompt=setting.max_prompt, long_tokens=setting.long_tokens,
            forced=setting.fast,
        )  # fmt: skip
        return [replace(request, number=first + request.number) for request in drawn]

    async def _start(self, world: World) -> None:
        setting = self.setting
        names = [f"prefill-{number}" for number in range(setting.num_prefill)]
        names += [f"decode-{number}" for number in range(setting.num_decode)]
        gateways = ["gateway-0", "gateway-1"]
        world.skew(*names, *gateways)
        for name in names:
            await self._start_worker(world, name.split("-")[0], name)
        for name in gateways:
            await world.core(name, **setting.gateways)
        await world.acquainted()

    async def _start_worker(self, world: World, role: str, name: str) -> Worker[Any]:
        model = self.setting.model(int(name.split("-")[1]))
        start = world.prefill if role == "prefill" else world.decode
        own = self.setting.prefill if role == "prefill" else self.setting.decode
        degree = self.setting.degrees.get(name, 1)
        remote = self.setting.remote.get(name, 0)
        ranks = {"tensor_parallel_size": degree, "remote_ranks": remote}
        return await start(name, model, **ranks, **self.setting.workers, **own)

    def _forced_checks(self, request: ClientRequest) -> list[Check]:
        models = [self.setting.model(number) for number in range(2)]
        return [ForcedCheck(models, request.prompt, request.sampling, choice) for choice in range(request.n)]


def play(seed: int, faults: Sequence[Fault] | None = None, num_requests: int = NUM_REQUESTS) -> Story:
    """Raises `FailedSeed`."""
    began = time.process_time()
    scenario = Play(seed, faults, num_requests)
    try:
        log: EventLog = simulate(seed, scenario, limit=LIMIT_S)
    except Exception as error:
        raise FailedSeed(f"{type(error).__name__}: {error}\nagain: {command(seed, faults, num_requests)}") from error
    return Story(
        log.digest,
        len(scenario.outcomes),
        scenario.num_steps,
        tuple(scenario.hits),
        tuple(scenario.outcomes),
        time.process_time() - began,
    )


def command(seed: int, faults: Sequence[Fault] | None = None, num_requests: int = NUM_REQUESTS) -> str:
    """What replays it, exactly."""
    line = f"python tests/simulation seed {seed}"
    if num_requests != NUM_REQUESTS:
        line += f" --requests {num_requests}"
    return line if faults is None else f"{line} --faults '{dump(faults)}'"
