"""The workers that live, from their heartbeats. Pure: events and `now` in, what changed out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvferry.bus.liveness import Liveness, Seen
from kvferry.wire.beats import Heartbeat, Load, WorkerState
from kvferry.wire.fields import WORKER_ROLES
from kvferry.wire.record import Feature, WorkerRecord
from kvferry_gateway.placement.pairing import Partners, capacity_of

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

    def __init__(self, now: float, served: Mapping[str, str]) -> None:
        """`served`: the models that requests may name, and the `vocabulary_id` of each."""
        self.liveness: Final = Liveness(now)
        self._served = served
        self._workers: dict[int, _Worker] = {}
        self._causes: dict[int, Cause] = {}  # what supervisors said of processes that ended
        self._ready_at: dict[str, float] = {}  # model -> when one of its decode workers was last known to be ready

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
            worker = self._workers[incarnation] = _Worker(beat.record, beat.load, beat.state, beat.beat)
        elif (beat.beat - worker.beat) & 0xFFFFFFFF >= 1 << 31 or beat.beat == worker.beat:
            return None  # overtaken on the bus, or doubled
        else:
            worker.load, worker.state, worker.beat = beat.load, beat.state, beat.beat
        if self._is_usable(worker):
            self._ready_at[worker.record.model] = now
        return seen

    def bus_up(self, now: float) -> None:
        """After an outage, in which nobody could be heard."""
        self.liveness.bus_up(now)
        for worker in self._workers.values():
            if self._is_usable(worker):
                self._ready_at[worker.record.model] = now

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

    def unserved(self, worker: WorkerRecord) -> str | None:
        """Why no request goes to this worker, whatever its state; None: some may."""
        vocabulary_id = self._served.get(worker.model)
        if vocabulary_id is None:
            return f"the gateway was not told of a model '{worker.model}'"
        if vocabulary_id and worker.vocabulary_id and worker.vocabulary_id != vocabulary_id:
            return f"its vocabulary is not that of the gateway's '{worker.model}': one of them has another model"
        return None

    def objections(self, worker: WorkerRecord) -> dict[str, str]:
        """The workers of its model that it will not pair with, by name, and why."""
        others = [
            other.record
            for other in self._workers.values()
            if other.record.model == worker.model and other.record.role != worker.role
        ]
        if worker.role == "decode":
            found = {prefill.name: Partners.of(worker).objection(prefill) for prefill in others}
        else:
            found = {decode.name: Partners.of(decode).objection(worker) for decode in others}
        return {name: why for name, why in found.items() if why is not None}

    def max_model_len(self, model: str) -> int | None:
        """Longest prompt + output that a live decode worker of `model` can hold; None without one."""
        return max((capacity_of(worker.record) for worker in self._decoders(model)), default=None)

    def without_grammars(self) -> set[int]:
        """Incarnations that would pass over a request's grammar: workers of an older version."""
        return {incarnation for incarnation, worker in self._workers.items() if not worker.record.grammars}

    def without(self, feature: Feature) -> set[int]:
        """Incarnations of an older version, which would pass over it."""
        return {incarnation for incarnation, worker in self._workers.items() if feature not in worker.record.features}

    def has_pair(self, model: str) -> bool:
        """Whether a request could be served: a ready decode worker can also prefill."""
        return any(worker.state == "ready" for worker in self._decoders(model))

    def absent_for(self, model: str, now: float) -> float:
        """Seconds since one of its decode workers was last known to be ready; infinitely many if none ever was."""
        return max(0.0, now - self._ready_at.get(model, -math.inf))

    def _decoders(self, model: str) -> list[_Worker]:
        """Of one of the served models."""
        return [
            worker for worker in self._workers.values() if worker.record.model == model and self._is_decoder(worker)
        ]

    def _is_decoder(self, worker: _Worker) -> bool:
        """Whether requests may ever go there to be decoded."""
        return worker.record.role == "decode" and self.unserved(worker.record) is None

    def _is_usable(self, worker: _Worker) -> bool:
        return worker.state == "ready" and self._is_decoder(worker)

    def rows(self, now: float) -> list[dict[str, Any]]:
        """For `/v1/cluster`. `pairs_with`: the prefill workers whose KV a decode worker takes; `refuses`: the others of
        its model, and why; `unserved`: why no request goes there."""
        records = [worker.record for worker in self._workers.values()]
        prefills = [record for record in records if record.role == "prefill"]
        pairings = {group: _pairing(group, prefills) for group in map(Partners.of, records)}
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
                "ranks": worker.record.ranks,
                "kv_dtype": worker.record.kv_dtype,
                "unserved": self.unserved(worker.record),
                **(pairings[Partners.of(worker.record)] if worker.record.role == "decode" else _pairing(None, ())),
                "max_model_len": worker.record.max_model_len,
                "block_size": worker.record.block_size,
                "num_blocks": worker.record.num_blocks,
                "kv_token_bytes": worker.record.kv_token_bytes,
                "load": {field: getattr(worker.load, field) for field in _SHOWN},
            }
            for worker in self._workers.values()
        ]


def _pairing(partners: Partners | None, prefills: Sequence[WorkerRecord]) -> dict[str, Any]:
    """Of one kind of decode workers with the prefill workers of their model."""
    objections = {p.name: partners.objection(p) for p in prefills if partners is not None and p.model == partners.model}
    return {
        "pairs_with": [name for name, why in objections.items() if why is None],
        "refuses": {name: why for name, why in objections.items() if why is not None},
    }
