"""From what a gateway sees of its workers to what a decision needs. Pure; remembers half a minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvferry_gateway.placement.estimates import StepLine
from kvferry_gateway.placement.targets import Targets
from kvferry_local.autoscale.decision import DecodeSignals, PrefillSignals

WINDOW_S: Final = 30.0
LEAST_SPAN_S: Final = 5.0  # two looks one after the other say nothing about how a queue grows
STEP_MEMORY: Final = 1024.0  # heartbeats of all decode workers
# Until a worker has measured itself, what it has queued says how long it takes only roughly.
NOMINAL_PREFILL_TOKENS_PER_S: Final = 1000.0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as its heartbeat told it: a row of `/v1/cluster`."""

    name: str
    role: str
    state: str
    num_blocks: int
    free_blocks: int
    num_waiting: int
    num_running: int
    waiting_tokens: int
    prefill_tokens_per_s: float
    decode_step_s: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> WorkerView:
        """Raises KeyError or TypeError for what is no such row."""
        load = row["load"]
        own = {field: row[field] for field in ("name", "role", "state", "num_blocks")}
        return cls(**own, **{field: load[field] for field in cls.__slots__ if field not in own})


class Watch:
    """What is remembered between two looks at the cluster."""

    def __init__(self) -> None:
        self._prefill: deque[tuple[float, float, float]] = deque()  # (time, workers busy, seconds queued)
        self._tokens: deque[tuple[float, float]] = deque()  # (time, tokens a second)
        self._steps = StepLine(STEP_MEMORY)

    def prefill(self, workers: Sequence[WorkerView], targets: Targets, now: float) -> PrefillSignals | None:
        """None without a worker that is ready: what is wanted cannot be told."""
        ready = [worker for worker in workers if worker.role == "prefill" and worker.state == "ready"]
        if not ready:
            return None
        rates = [worker.prefill_tokens_per_s for worker in ready if worker.prefill_tokens_per_s]
        rate = sum(rates) / len(rates) if rates else NOMINAL_PREFILL_TOKENS_PER_S
        queued_s = sum(worker.waiting_tokens for worker in ready) / rate
        self._prefill.append((now, sum(worker.waiting_tokens > 0 for worker in ready), queued_s))
        while self._prefill[0][0] < now - WINDOW_S:
            self._prefill.popleft()
        began, _, queued_then_s = self._prefill[0]
        return PrefillSignals(
            busy=sum(busy for _, busy, _ in self._prefill) / len(self._prefill),
            queued_s=queued_s,
            growth=(queued_s - queued_then_s) / max(now - began, LEAST_SPAN_S),
            wait_s=queued_s / len(ready),
            ttft_s=targets.ttft_s,
        )

    def decode(
        self, workers: Sequence[WorkerView], targets: Targets, max_num_seqs: int, now: float
    ) -> DecodeSignals | None:
        """None without a worker that is ready. What a draining one still has counts: it may hand it over."""
        alive = [worker for worker in workers if worker.role == "decode" and worker.state in ("ready", "draining")]
        ready = [worker for worker in alive if worker.state == "ready"]
        if not ready:
            return None
        for worker in ready:
            self._steps.observe(worker.num_running, worker.decode_step_s)
        base, slope = self._steps.fit() or (0.0, 0.0)
        given = sum(worker.num_running / worker.decode_step_s for worker in alive if worker.decode_step_s)
        self._tokens.append((now, given))
        while self._tokens[0][0] < now - WINDOW_S:
            self._tokens.popleft()
        return DecodeSignals(
            streams=sum(worker.num_running + worker.num_waiting for worker in alive),
            tokens_per_s=sum(given for _, given in self._tokens) / len(self._tokens),
            step_base_s=base,
            step_slope_s=slope,
            used_blocks=sum(worker.num_blocks - worker.free_blocks for worker in alive),
            blocks_per_worker=sum(worker.num_blocks for worker in ready) / len(ready),
            itl_s=targets.itl_s,
            max_num_seqs=max_num_seqs,
        )
