"""Which workers get a request. Pure: a snapshot in, a decision out.

Least expected work: a prefill worker by the seconds until it would have computed this prompt, a decode worker
by the time of a step with one more sequence in it; the two parts add up, so within a group of workers that
may pair (`Partners`) each side is chosen by itself. A decode worker that lacks the blocks right now comes after
all that have them. Ties go to the worker that was placed on least recently, then by name.

Exactness: a unit that an exact decode worker has accepted is *bound* to that worker's numerics_id. What was
computed under another one would differ in its bits, and the text would change in the middle without a word.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Final

from kvferry.wire.messages import Load, WorkerRecord, WorkerState

# Stand-ins until a worker has measured itself: they only have to rank new workers sensibly.
NOMINAL_PREFILL_TOKENS_PER_S: Final = 1000.0
NOMINAL_DECODE_STEP_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One live worker as the registry sees it."""

    record: WorkerRecord
    load: Load
    state: WorkerState
    # What this gateway has placed there since the heartbeat that `load` came with.
    placed_requests: int = 0
    placed_tokens: int = 0
    last_placed: int = 0  # number of the placement; 0: never

    @property
    def incarnation(self) -> int:
        return self.record.incarnation

    @property
    def capacity(self) -> int:
        """Longest prompt + output in tokens."""
        return min(self.record.max_model_len, self.record.num_blocks * self.record.block_size)


@dataclass(frozen=True, slots=True)
class Placement:
    """What is to be placed."""

    model: str
    num_tokens: int  # to prefill: prompt + generated so far
    max_total: int  # prompt + max_tokens
    local_prefill_threshold: int
    full: Set[int] = field(default_factory=frozenset)  # incarnations that refused for now
    unusable: Set[int] = field(default_factory=frozenset)  # incarnations that can't be reached or serve no more
    bound_to: str | None = None  # numerics_id that the unit began on; None: it has not begun, or in `fast`


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: WorkerView
    decode: WorkerView


@dataclass(frozen=True, slots=True)
class Local:
    """The decode worker computes the prompt itself."""

    decode: WorkerView


@dataclass(frozen=True, slots=True)
class NoWorker:
    """Nobody is left who could take it."""


@dataclass(frozen=True, slots=True)
class TooLong:
    """There are workers, but none whose pool or context could ever hold it."""

    capacity: int


@dataclass(frozen=True, slots=True)
class OtherNumerics:
    """There are workers, but none of the numerics_id that the unit is bound to."""

    numerics_id: str


Decision = Pair | Local | NoWorker | OtherNumerics | TooLong


@dataclass(frozen=True, slots=True)
class Partners:
    """Which prefill workers' KV a decode worker takes: any of an equal KV format, and in `exact` of its numerics alone.

    An exact worker that took other KV would keep it in its prefix cache and serve it to exact requests later.
    """

    model: str
    kv_format_id: str
    numerics_id: str | None  # None: the decode worker is not exact

    @classmethod
    def of(cls, decode: WorkerRecord) -> Partners:
        return cls(decode.model, decode.kv_format_id, numerics_of(decode))

    def include(self, prefill: WorkerRecord) -> bool:
        return (
            prefill.model == self.model
            and prefill.kv_format_id == self.kv_format_id
            and self.numerics_id in (None, numerics_of(prefill))
        )


def numerics_of(worker: WorkerRecord) -> str | None:
    """What a unit is bound to once this decode worker has accepted it; None: to nothing, it runs `fast`."""
    return worker.numerics_id if worker.exact else None


def place(request: Placement, workers: tuple[WorkerView, ...]) -> Decision:
    """Decide. `NoWorker` with some in `request.full` means that all are full."""
    serving = [w for w in workers if w.record.model == request.model and w.state == "ready"]
    decoders = [w for w in serving if w.record.role == "decode" and w.incarnation not in request.unusable]
    if request.bound_to is not None:
        bound = [w for w in decoders if numerics_of(w.record) == request.bound_to]
        if decoders and not bound:
            return OtherNumerics(request.bound_to)
        decoders = bound
    if decoders and all(w.capacity < request.max_total for w in decoders):
        return TooLong(max(w.capacity for w in decoders))
    decoders = [w for w in decoders if w.incarnation not in request.full and w.capacity >= request.max_total]
    if not decoders:
        return NoWorker()
    prefillers = [
        w
        for w in serving
        if w.record.role == "prefill" and w.incarnation not in request.unusable and w.capacity >= request.num_tokens
    ]
    if request.num_tokens < request.local_prefill_threshold or not prefillers:
        return Local(min(decoders, key=lambda w: _local_key(w, request)))
    pairs: list[tuple[bool, float, Pair]] = []
    for partners, group in _by_partners(decoders).items():
        able = [w for w in prefillers if partners.include(w.record) and w.incarnation not in request.full]
        if not able:
            continue
        prefill = min(able, key=lambda w: _prefill_key(w, request))
        decode = min(group, key=lambda w: _decode_key(w, request))
        cost = prefill_seconds(prefill, request.num_tokens) + decode_seconds(decode)
        pairs.append((lacks_blocks(decode, request), cost, Pair(prefill, decode)))
    if pairs:
        return min(pairs, key=lambda pair: pair[:2])[2]
    # The prefill workers are full: decode must not take their load on top. Only a decode worker that no
    # prefill worker may serve computes prompts itself.
    unpaired = [
        w
        for partners, group in _by_partners(decoders).items()
        if not any(partners.include(p.record) for p in prefillers)
        for w in group
    ]
    return Local(min(unpaired, key=lambda w: _local_key(w, request))) if unpaired else NoWorker()


def prefill_seconds(worker: WorkerView, num_tokens: int) -> float:
    """Until this worker would have computed a prompt that is placed now."""
    rate = worker.load.prefill_tokens_per_s or NOMINAL_PREFILL_TOKENS_PER_S
    return (worker.load.waiting_tokens + worker.placed_tokens + num_tokens) / rate


def decode_seconds(worker: WorkerView) -> float:
    """What one more sequence waits there: a measured step for each sequence that is ahead of it."""
    step = worker.load.decode_step_s or NOMINAL_DECODE_STEP_S
    return step * (1 + worker.load.num_running + worker.load.num_waiting + worker.placed_requests)


def lacks_blocks(worker: WorkerView, request: Placement) -> bool:
    tokens = request.num_tokens + 1 + worker.placed_tokens
    return -(-tokens // max(1, worker.record.block_size)) > worker.load.free_blocks


def _by_partners(decoders: list[WorkerView]) -> dict[Partners, list[WorkerView]]:
    groups: dict[Partners, list[WorkerView]] = {}
    for worker in decoders:
        groups.setdefault(Partners.of(worker.record), []).append(worker)
    return groups


def _prefill_key(worker: WorkerView, request: Placement) -> tuple[float, int, str]:
    return prefill_seconds(worker, request.num_tokens), worker.last_placed, worker.record.name


def _decode_key(worker: WorkerView, request: Placement) -> tuple[bool, float, int, str]:
    return lacks_blocks(worker, request), decode_seconds(worker), worker.last_placed, worker.record.name


def _local_key(worker: WorkerView, request: Placement) -> tuple[bool, float, int, str]:
    cost = prefill_seconds(worker, request.num_tokens) + decode_seconds(worker)
    return lacks_blocks(worker, request), cost, worker.last_placed, worker.record.name
