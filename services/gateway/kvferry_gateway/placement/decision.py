"""What placement is asked, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal

from kvferry.wire.record import WorkerRecord
from kvferry_gateway.placement.pairing import NoWorker, OtherNumerics, TooLong

Why = Literal[
    "cached_prefix",  # the prefill worker has more of the prompt cached than the least loaded one
    "least_work",
    "short_prompt",  # below the threshold: prefilled on the decode worker
    "faster_on_decode",
    "no_prefill_worker",  # that may serve this decode worker: it prefills itself
]


@dataclass(frozen=True, slots=True)
class Request:
    """One unit to be placed, among the workers of its model."""

    num_tokens: int  # to prefill: prompt + generated so far
    max_total: int  # prompt + max_tokens
    seed: int = 0  # of ties: from the ticket
    keys: tuple[int, ...] = ()  # of its full blocks, as the prefix index has them
    priority: int = 0
    deadline_s: float = math.inf  # seconds left for the first token
    local_prefill_threshold: int = 0
    full: Set[int] = field(default_factory=frozenset)  # incarnations that refused for now
    unusable: Set[int] = field(default_factory=frozenset)
    bound_to: str | None = None  # numerics_id that the unit began on
    admitted: bool = False  # it was taken before and lost its workers: no wait is too long


@dataclass(frozen=True, slots=True)
class Reason:
    """Why this one, in numbers: for the trace and `/v1/cluster`. Times in seconds, as predicted."""

    why: Why
    ttft_s: float
    queue_s: float
    prefill_s: float
    transfer_s: float
    itl_s: float
    chance: float  # of keeping both targets
    cached_tokens: int  # on the worker that prefills
    num_considered: int  # pairs and decode workers compared


@dataclass(frozen=True, slots=True)
class Placed:
    """`prefill` None: the decode worker computes the prompt itself."""

    prefill: WorkerRecord | None
    decode: WorkerRecord
    cost: float  # in targets, see `comparison`
    lowest_cost: float  # of all that were compared; below `cost` only by what breaking a tie costs
    reason: Reason


@dataclass(frozen=True, slots=True)
class Hopeless:
    """It would wait for longer than its deadline, or than its priority may: 429 at once."""

    expected_s: float
    retry_after: float


Decision = Placed | Hopeless | NoWorker | OtherNumerics | TooLong
