"""What a decode worker runs next, and whose memory it takes. Pure: events and `now` in, decisions out.

    pull:   opening ──P holds memory, due──> waiting ──reserve n + 1──> fetching ──verified──> running ──> ended
    local:                                   waiting ──reserve n + 1──> computing ──token──> running ──> ended

Memory goes back from younger to older sequences only: fetching ones first, then, for growth alone, running
ones. What loses its memory is dropped as `preempted` and placed again by its gateway.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.kv.ledger import BlockState
from kvferry.schedule.chunk import ChunkBudget
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.queue import AdmissionQueue
from kvferry.schedule.sequence import Dropped, Emission, Key, ModelLimits, Sequence, pick_alone
from kvferry.schedule.step import SequenceStep, StepPlan, StepResult
from kvferry.wire.messages import RejectReason


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """Bounds of the scheduler; seconds, tokens, sequences, blocks."""

    max_waiting: int
    max_num_seqs: int
    max_num_batched_tokens: int
    overtake_s: float
    pull_deadline_s: float
    watermark_blocks: int


@dataclass(frozen=True, slots=True)
class DecodeDecision:
    plan: StepPlan | None
    fetch: tuple[Sequence, ...]  # got their blocks: start the pull's Fetch
    dropped: tuple[Dropped, ...]  # abort their pulls, tell their gateways


class DecodeScheduler:
    """Owns the worker's sequences and their memory. Only the event loop calls it."""

    def __init__(self, memory: KVMemory, limits: ModelLimits, policy: DecodePolicy) -> None:
        self.memory = memory
        self.chunk = ChunkBudget(policy.max_num_batched_tokens, memory.block_size)
        self.sequences: dict[Key, Sequence] = {}
        self.num_preempted = 0
        self._limits = limits
        self._policy = policy
        self._opening: dict[Key, Sequence] = {}
        self._waiting = AdmissionQueue(policy.overtake_s)
        self._pulls: dict[Key, None] = {}  # of waiting sequences: those that fetch rather than compute
        self._computing: dict[Key, Sequence] = {}
        self._fetching: dict[Key, Sequence] = {}
        self._running: dict[Key, Sequence] = {}
        self._in_step: dict[int, Sequence] = {}
        self._turn = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._opening)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that this worker has to compute itself, queued or under way."""
        queued = sum(s.num_context for s in self._waiting if s.key not in self._pulls)
        return queued + sum(s.num_context - s.num_computed for s in self._computing.values())

    def add(self, sequence: Sequence, pull: bool) -> RejectReason | None:
        """Take a sequence: `pull` fetches its KV once `due`, otherwise it is computed here."""
        if self.memory.blocks_for(sequence.num_context + 1) > self.memory.pool.num_blocks:
            return "too_long"
        if sequence.num_context >= self._limits.max_model_len:
            return "too_long"
        if self.num_waiting >= self._policy.max_waiting:
            return "queue_full"
        self.sequences[sequence.key] = sequence
        if pull:
            sequence.state = "opening"
            self._opening[sequence.key] = sequence
        else:
            self._waiting.add(sequence)
        return None

    def due(self, key: Key) -> None:
        """P holds memory and the time has come to reserve."""
        sequence = self._opening.pop(key, None)
        if sequence is not None:
            self._pulls[key] = None
            self._waiting.add(sequence)

    def cancel(self, key: Key) -> Sequence | None:
        """Forget a sequence in any state. Its blocks are free at once, or when the running step and copies end."""
        sequence = self.sequences.pop(key, None)
        if sequence is None:
            return None
        self._waiting.remove(key)
        for stage in (self._opening, self._computing, self._fetching, self._running):
            stage.pop(key, None)
        self._pulls.pop(key, None)
        sequence.state = "ended"
        self.memory.free(sequence)
        return sequence

    def fetched(self, key: Key, token: int, now: float) -> Emission | None:
        """The pull is verified: the sequence may run, from its first token. None if it is gone."""
        sequence = self._fetching.pop(key, None)
        if sequence is None:
            return None
        sequence.num_computed = sequence.num_context
        self.memory.publish(sequence, sequence.num_context)
        return self._started(sequence, token, now)

    def plan(self, now: float) -> DecodeDecision:
        """Grow what runs, admit what fits, cut the next step. Its sequences are pinned until `finish`."""
        assert not self._in_step, "a step is under way"
        dropped = [
            Dropped(sequence, "deadline")
            for sequence in (*self._waiting, *self._opening.values())
            if sequence.deadline is not None and now >= sequence.deadline
        ]
        for item in dropped:
            self.cancel(item.sequence.key)
        ready = self._grow_running(dropped)
        fetch: list[Sequence] = []
        self._waiting.admit(now, lambda s: self._admit(s, now, fetch), lambda s: self._reclaim(s, dropped))
        chosen = pick_alone((*ready, *self._computing.values()), self._turn)
        self._turn += 1
        budget = max(self.chunk.tokens, 1 + len(ready))
        steps: list[SequenceStep] = []
        for sequence in chosen:
            if sequence.key not in self.sequences:
                continue  # preempted by an older one after it had grown
            rows = min(budget, sequence.num_tokens - sequence.num_computed)
            if rows <= 0:
                break
            budget -= rows
            steps.append(sequence.step(rows))
            self._in_step[sequence.sequence_id] = sequence
            self.memory.pin(sequence)
        plan = StepPlan(tuple(steps)) if steps else None
        return DecodeDecision(plan, tuple(fetch), tuple(dropped))

    def finish(self, plan: StepPlan, result: StepResult, now: float) -> list[Emission]:
        """Account for a step: tokens are appended, full blocks become findable, ended sequences freed."""
        emissions: list[Emission] = []
        num_decoded = sum(1 for step in plan.steps if len(step.tokens) == 1)
        if num_decoded < len(plan.steps):
            self.chunk.observe(plan.num_tokens - num_decoded, result.seconds)
        for step, token in zip(plan.steps, result.tokens, strict=True):
            sequence = self._in_step.pop(step.sequence_id)
            sequence.num_computed += len(step.tokens)
            if not sequence.doomed:
                self.memory.publish(sequence, sequence.num_computed)
            self.memory.unpin(sequence)
            if token is None or sequence.key not in self.sequences:
                continue
            self._computing.pop(sequence.key, None)
            emissions.append(self._started(sequence, token, now))
        return emissions

    def abandon_step(self, detail: str) -> list[Dropped]:
        """The step failed: every sequence in it is given up."""
        failed = list(self._in_step.values())
        self._in_step.clear()
        for sequence in failed:
            self.memory.unpin(sequence)
        return [Dropped(s, "error", detail) for s in failed if self.cancel(s.key) is not None]

    def expire(self, now: float) -> list[Dropped]:
        """Drop pulls that did not end in time."""
        late = [self._fetching[key] for key in self.memory.ledger.overdue(now) if key in self._fetching]
        return [Dropped(s, "transfer_failed", "pull deadline") for s in late if self.cancel(s.key) is not None]

    def drain(self) -> list[Dropped]:
        """Hand back what does not run yet."""
        early = (*self._waiting, *self._opening.values(), *self._fetching.values(), *self._computing.values())
        return [Dropped(s, "draining") for s in early if self.cancel(s.key) is not None]

    def hand_over(self) -> list[Dropped]:
        """Hand back everything: the grace time is over."""
        return [Dropped(s, "draining") for s in list(self.sequences.values()) if self.cancel(s.key) is not None]

    def _started(self, sequence: Sequence, token: int, now: float) -> Emission:
        """Append a drawn token to a sequence whose context is computed."""
        index = sequence.next_index
        sequence.append_token(token)
        reason = sequence.end_reason(token, self._limits)
        if reason is not None:
            self.cancel(sequence.key)
        elif sequence.state != "running":
            sequence.state = "running"
            self._running[sequence.key] = sequence
            self.memory.move(sequence, BlockState.RUNNING, now)
        return Emission(sequence, index, token, reason)

    def _grow_running(self, dropped: list[Dropped]) -> list[Sequence]:
        """A block for every running sequence's next row, oldest first; the sequences that may step."""
        ready: list[Sequence] = []
        for sequence in sorted(self._running.values(), key=lambda item: item.order):
            if sequence.key not in self._running:
                continue
            while not self.memory.grow(sequence):
                victim = self._victim(sequence, growth=True)
                self._preempt(victim or sequence, dropped)
                if victim is None or victim.doomed:
                    break  # its own memory went, or the victim's comes back when its copies end
            else:
                ready.append(sequence)
        return ready

    def _admit(self, sequence: Sequence, now: float, fetch: list[Sequence]) -> bool:
        holders = len(self._running) + len(self._fetching) + len(self._computing)
        if holders >= self._policy.max_num_seqs:
            return False
        pull = sequence.key in self._pulls
        reserved = self.memory.reserve(
            sequence,
            sequence.num_context + 1,
            # A local prefill computes at least the last token: its logits give the next one.
            max_hit=sequence.num_context if pull else sequence.num_context - 1,
            state=BlockState.FETCHING if pull else BlockState.RUNNING,
            now=now,
            deadline=now + self._policy.pull_deadline_s if pull else None,
            # Room for growth; an idle worker has nobody who grows.
            watermark=self._policy.watermark_blocks if holders else 0,
        )
        if not reserved:
            return False
        if pull:
            del self._pulls[sequence.key]
            sequence.state = "fetching"
            self._fetching[sequence.key] = sequence
            fetch.append(sequence)
        else:
            sequence.state = "computing"
            self._computing[sequence.key] = sequence
        return True

    def _victim(self, sequence: Sequence, growth: bool) -> Sequence | None:
        """Whose memory an older `sequence` may take: the youngest that fetches or computes, else, to grow, runs."""
        stages = ([*self._fetching.values(), *self._computing.values()], list(self._running.values()) if growth else [])
        for stage in stages:
            younger = [other for other in stage if other.order > sequence.order]
            if younger:
                return max(younger, key=lambda item: item.order)
        return None

    def _preempt(self, victim: Sequence, dropped: list[Dropped]) -> None:
        self.num_preempted += 1
        self.cancel(victim.key)
        dropped.append(Dropped(victim, "preempted"))

    def _reclaim(self, sequence: Sequence, dropped: list[Dropped]) -> bool:
        wanted = self.memory.blocks_for(sequence.num_context + 1) + self._policy.watermark_blocks
        coming = self.memory.pool.num_free
        freed = False
        while coming < wanted and (victim := self._victim(sequence, growth=False)) is not None:
            coming += victim.num_blocks
            self._preempt(victim, dropped)
            freed = True
        return freed
