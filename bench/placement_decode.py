"""The decode worker of the placement simulation: steps that grow with sequences, context and prompts. Pure."""

from __future__ import annotations

import math
from typing import Final

from bench.placement_workers import RATE_SMOOTHING, Costs, Job, Worker
from bench.traces import BLOCK_SIZE
from kvferry.wire.beats import Load

MAX_STEPS: Final = 32  # taken together: how often a batch's context is counted anew


class DecodeWorker(Worker):
    def __init__(self, incarnation: int, costs: Costs) -> None:
        super().__init__(incarnation, costs)
        self._running: list[Job] = []
        self._joining: list[Job] = []
        self._start_at = self._step_s = 0.0
        self._num_steps = 0  # of the segment under way; 0: idle
        self._chunk = 0
        self._segment = 0  # a segment that was cut short leaves its old end behind
        self._mean_step_s = 0.0

    def join(self, job: Job, now: float) -> None:
        """Its KV has come."""
        self.cache.use(job.request.keys)
        job.left = job.request.output_tokens - 1
        job.gap_from = job.first_at
        self._joining.append(job)
        self._disturb(now)

    def add(self, job: Job, now: float) -> None:
        """Its prompt is to be computed here."""
        self.queue.append(job)
        if len(self.queue) == 1:
            job.left = self.admit(job)
        self._disturb(now)

    def _disturb(self, now: float) -> None:
        """Something is to be taken in at the end of the step under way."""
        if not self._num_steps:
            self._begin(now)
            return
        steps = max(1, math.ceil((now - self._start_at) / self._step_s))
        if steps < self._num_steps:
            self._num_steps = steps
            self._schedule_end()

    def _schedule_end(self) -> None:
        self._segment += 1
        segment = self._segment
        end = self._start_at + self._num_steps * self._step_s
        self.costs.schedule(end, lambda now: self._end(now) if segment == self._segment else None)

    def _begin(self, now: float) -> None:
        self._running += self._joining
        self._joining.clear()
        running, rates = self._running, self.costs.rates
        self._num_steps = self._chunk = 0
        if not running and not self.queue:
            return
        seconds = 0.0
        if running:
            context = sum(job.request.prompt_tokens + job.request.output_tokens - job.left for job in running)
            seconds = rates.step_s(len(running), context) * self.costs.noise()
            self._num_steps = min(MAX_STEPS, min(job.left for job in running))
        if self.queue:
            job = self.queue[0]
            self._num_steps, self._chunk = 1, min(rates.chunk_tokens, job.left)
            chunk_s = rates.prefill_s(self._chunk, job.request.prompt_tokens - job.left) * self.costs.noise()
            self.measured(self._chunk, chunk_s)
            seconds += chunk_s
        self._start_at, self._step_s = now, seconds
        self._schedule_end()

    def _end(self, now: float) -> None:
        steps, step_s = self._num_steps, self._step_s
        self.busy_s += steps * step_s
        if self._running:
            self._mean_step_s += (step_s - self._mean_step_s) * (RATE_SMOOTHING if self._mean_step_s else 1.0)
        still = []
        for job in self._running:
            if job.gap_from is not None:
                self.costs.gaps.append((self._start_at + step_s - job.gap_from, 1))
                self.costs.gaps.append((step_s, steps - 1))
                job.gap_from = None
            else:
                self.costs.gaps.append((step_s, steps))
            job.left -= steps
            if job.left:
                still.append(job)
            else:
                self.costs.on_end(job, now)
        self._running = still
        if self._chunk:
            self._advance_prefill(now)
        self._begin(now)

    def _advance_prefill(self, now: float) -> None:
        job = self.queue[0]
        job.left -= self._chunk
        if job.left:
            return
        self.queue.popleft()
        self.costs.on_first_token(job, now)
        if job.request.output_tokens > 1:
            job.gap_from, job.left = now, job.request.output_tokens - 1
            self._joining.append(job)
        self.cache.use(job.request.keys)
        if self.queue:
            self.queue[0].left = self.admit(self.queue[0])

    def load(self, now: float) -> Load:
        blocks = sum(-(-(job.request.prompt_tokens + 32) // BLOCK_SIZE) for job in self._running)
        return Load(
            num_waiting=len(self._joining),
            num_running=len(self._running),
            waiting_tokens=self.waiting_tokens(),
            free_blocks=max(0, self.costs.rates.num_blocks - blocks),
            prefill_tokens_per_s=self.tokens_per_s,
            decode_step_s=self._mean_step_s,
        )
