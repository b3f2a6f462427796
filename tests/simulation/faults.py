"""What befalls a cluster: a schedule of faults as plain values, drawn from a seed or by hypothesis."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

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
MAX_DELAY_S = 0.004  # of what is under way on the data plane


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
