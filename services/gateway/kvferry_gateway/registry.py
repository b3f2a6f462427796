"""The workers that live, from their heartbeats. Pure: events and `now` in, what changed out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from kvferry.bus.liveness import Liveness, Seen
from kvferry.wire.messages import WORKER_ROLES, Heartbeat, Load, WorkerRecord, WorkerState
from kvferry_gateway.placement import Partners, capacity_of

MAX_WORKERS: Final = 4096  # incarnations known at once
MAX_CAUSES: Final = 4096

_SHOWN: Final = tuple(field for field in Load.__struct_fields__ if field != "pulls")  # of a load
Cause = Literal["crashed", "killed", "stopped"]


@dataclass(slots=True)
class _Worker:
    record: WorkerRecord
    load: Load
    state: WorkerState
    beat: int


class Registry:
    """Workers by incarnation. Liveness is judged by `Liveness`; the shell calls `tick` every `BEAT_INTERVAL`."""

    def __init__(self, now: float) -> None:
        self.liveness: Final = Liveness(now)
        self._workers: dict[int, _Worker] = {}
        self._causes: dict[int, Cause] = {}  # what supervisors said of processes that ended

    def __len__(self) -> int:
        return len(self._workers)

    def observe(self, beat: Heartbeat, now: float) -> Seen | None:
        """Take a heartbeat. None: it is no worker's, is older than the last one, or there are too many workers."""
        incarnation = beat.record.incarnation
        worker = self._workers.get(incarnation)
        if beat.record.role not in WORKER_ROLES or (worker is None and len(self._workers) >= MAX_WORKERS):
            return None
        seen = self.liveness.observe(incarnation, now)
        if worker is None:
            self._workers[incarnation] = _Worker(beat.record, beat.load, beat.state, beat.beat)
            return seen
        if (beat.beat - worker.beat) & 0xFFFFFFFF >= 1 << 31 or beat.beat == worker.beat:
            return None  # overtaken on the bus, or doubled
        worker.load, worker.state, worker.beat = beat.load, beat.state, beat.beat
        return seen

    def remove(self, incarnation: int) -> WorkerRecord | None:
        """It is judged gone."""
        worker = self._workers.pop(incarnation, None)
        return None if worker is None else worker.record

    def exited(self, incarnation: int, cause: Cause, now: float) -> bool:
        """A supervisor says that a process has ended. True: ping it, to be sure."""
        self._causes[incarnation] = cause
        while len(self._causes) > MAX_CAUSES:
            del self._causes[next(iter(self._causes))]
        return self.liveness.suspect(incarnation, now)

    def has_crashed(self, incarnation: int) -> bool:
        """Whether it ended by itself, as far as its supervisor knows."""
        return self._causes.get(incarnation) == "crashed"

    def record_of(self, incarnation: int) -> WorkerRecord | None:
        worker = self._workers.get(incarnation)
        return None if worker is None else worker.record

    def state_of(self, incarnation: int) -> WorkerState | None:
        worker = self._workers.get(incarnation)
        return None if worker is None else worker.state

    def max_model_len(self, model: str) -> int | None:
        """Longest prompt + output that a live decode worker of `model` can hold; None without one."""
        records = [worker.record for worker in self._workers.values()]
        return max((capacity_of(w) for w in records if w.role == "decode" and w.model == model), default=None)

    def without_grammars(self) -> set[int]:
        """Incarnations that would pass over a request's grammar: workers of an older version."""
        return {incarnation for incarnation, worker in self._workers.items() if not worker.record.grammars}

    def has_pair(self, model: str) -> bool:
        """Whether a request could be served: a ready decode worker can also prefill."""
        return any(
            w.state == "ready" and w.record.role == "decode" and w.record.model == model for w in self._workers.values()
        )

    def rows(self, now: float) -> list[dict[str, Any]]:
        """For `/v1/cluster`. `pairs_with`: the prefill workers whose KV a decode worker takes."""
        records = [worker.record for worker in self._workers.values()]
        prefills = [record for record in records if record.role == "prefill"]
        partners = dict.fromkeys(Partners.of(record) for record in records if record.role == "decode")
        pairs = {group: [record.name for record in prefills if group.include(record)] for group in partners}
        return [
            {
                "role": worker.record.role,
                "name": worker.record.name,
                "pid": worker.record.pid,
                "model": worker.record.model,
                "incarnation": f"{worker.record.incarnation:016x}",
                "transport": worker.record.transport,
                "address": list(worker.record.address.shards),
                "debug_port": worker.record.debug_port,
                "state": worker.state,
                "silent_s": round(self.liveness.silent_for(worker.record.incarnation, now), 3),
                "kv_format_id": worker.record.kv_format_id,
                "numerics_id": worker.record.numerics_id,
                "engine": worker.record.engine,
                "engine_reason": worker.record.engine_reason,
                "exact": worker.record.exact,
                "pairs_with": pairs[Partners.of(worker.record)] if worker.record.role == "decode" else [],
                "max_model_len": worker.record.max_model_len,
                "block_size": worker.record.block_size,
                "num_blocks": worker.record.num_blocks,
                "kv_token_bytes": worker.record.kv_token_bytes,
                "load": {field: getattr(worker.load, field) for field in _SHOWN},
            }
            for worker in self._workers.values()
        ]
