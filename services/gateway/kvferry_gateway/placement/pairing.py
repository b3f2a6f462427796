"""The rules of placement that hold whatever is best: who may pair with whom, and why a request finds no place.

Exactness: a unit that an exact decode worker has accepted is *bound* to that worker's numerics_id. What was
computed under another one would differ in its bits, and the text would change in the middle without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.wire.record import WorkerRecord


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


@dataclass(frozen=True, slots=True)
class Partners:
    """Which prefill workers' KV a decode worker takes: any of an equal KV format, and in `exact` of its numerics alone.

    An exact worker that took other KV would keep it in its prefix cache and serve it to exact requests later.
    """

    model: str
    kv_format_id: str
    numerics_id: str | None  # None: the decode worker is not exact
    kv_dtype: str = ""  # this and the next one follow from the format: they say in what two of them differ
    block_size: int = 0

    @classmethod
    def of(cls, decode: WorkerRecord) -> Partners:
        return cls(decode.model, decode.kv_format_id, numerics_of(decode), decode.kv_dtype, decode.block_size)

    def include(self, prefill: WorkerRecord) -> bool:
        return self.objection(prefill) is None

    def objection(self, prefill: WorkerRecord) -> str | None:
        """Why this prefill worker's KV is not taken, for people; None: it is."""
        if prefill.model != self.model:
            return f"model '{prefill.model}' instead of '{self.model}'"
        if prefill.kv_format_id != self.kv_format_id:
            if prefill.kv_dtype != self.kv_dtype:
                return f"KV in {prefill.kv_dtype or 'an unknown dtype'} instead of {self.kv_dtype or 'an unknown one'}"
            if prefill.block_size != self.block_size:
                return f"KV blocks of {prefill.block_size} tokens instead of {self.block_size}"
            return "other weights, quantization or RoPE"
        if self.numerics_id not in (None, numerics_of(prefill)):
            return f"numerics '{prefill.numerics_id}', and this decode worker is exact"
        return None


def numerics_of(worker: WorkerRecord) -> str | None:
    """What a unit is bound to once this decode worker has accepted it; None: to nothing, it runs `fast`."""
    return worker.numerics_id if worker.exact else None


def capacity_of(worker: WorkerRecord) -> int:
    """Longest prompt + output in tokens."""
    return min(worker.max_model_len, worker.num_blocks * worker.block_size)
