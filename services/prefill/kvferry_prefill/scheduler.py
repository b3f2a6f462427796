"""What a prefill worker computes next, and whose memory it takes. Pure: events and `now` in, decisions out.

    waiting ──reserve whole prompt──> computing ──token 0──> held ──Ack──> gone
       │                                  │                    ├─ lease over, older request needs memory ─> dropped
       └── cancel, deadline ──> gone      └── cancel ──> gone  └─ cancel ──> gone

A sequence whose first token ends it is never held, nor one that is only scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvferry.kv.ledger import BlockState
from kvferry.schedule.chunk import ChunkBudget
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.queue import AdmissionQueue, to_displace
from kvferry.schedule.sequence import Dropped, Emission, Key, ModelLimits, Sequence, pick_alone, put_in_order
from kvferry.schedule.step import SequenceStep, StepPlan, StepResult
from kvferry.schedule.under_way import StepsUnderWay
from kvferry.wire.logprobs import TokenLogprobs
from kvferry.wire.work import RejectReason


@dataclass(frozen=True, slots=True)
class PrefillPolicy:
    """Bounds of the scheduler; seconds, tokens, sequences."""

    max_waiting: int
    max_num_batched_tokens: int
    overtake_s: float
    lease_s: float


@dataclass(frozen=True, slots=True)
class PrefillDecision:
    plan: StepPlan | None
    sequences: tuple[Sequence, ...]  # of the plan
    dropped: tuple[Dropped, ...]


class PrefillScheduler:
    """Owns the worker's sequences and their memory. Only the event loop calls it."""

    def __init__(self, memory: KVMemory, limits: ModelLimits, policy: PrefillPolicy) -> None:
        self.memory = memory
        self.chunk = ChunkBudget(policy.max_num_batched_tokens, memory.block_size)
        self.sequences: dict[Key, Sequence] = {}
        self.first_tokens: dict[Key, int] = {}  # of held sequences
        self.first_logprobs: dict[Key, TokenLogprobs] = {}  # of those that want any
        self._limits = limits
        self._policy = policy
        self._waiting = AdmissionQueue(policy.overtake_s)
        self._computing: dict[Key, Sequence] = {}
        self._held: dict[Key, Sequence] = {}
        self.under_way = StepsUnderWay(memory)
        self._turn = 0
        # Set by the sender: is there a live Open for this key? Its KV is reclaimed last, its lease renewed.
        self.has_open: Callable[[Key], bool] = lambda _key: False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._computing)

    @property
    def queued_tokens(self) -> tuple[int, ...]:
        """Prompt tokens to compute, queued or under way, by priority class."""
        return self.memory.uncomputed(self._waiting, self._computing.values())

    def add(self, sequence: Sequence) -> RejectReason | None:
        if self.memory.blocks_for(sequence.num_context) > self.memory.pool.num_blocks:
            return "too_long"
        if sequence.num_context >= self._limits.max_model_len:
            return "too_long"
        if len(self._waiting) >= self._policy.max_waiting:
            return "queue_full"
        self.sequences[sequence.key] = sequence
        self._waiting.add(sequence)
        return None

    def displace(self, urgent: Sequence) -> Dropped | None:
        """Give up a waiting sequence for one that the full queue has refused, if one has a lower priority."""
        victim = to_displace(self._waiting, urgent)
        if victim is None:
            return None
        self.cancel(victim.key)
        return Dropped(victim, "preempted")

    def cancel(self, key: Key) -> Sequence | None:
        """Forget a sequence in any state. Its blocks are free at once, or when the running step and copies end."""
        sequence = self.sequences.pop(key, None)
        if sequence is None:
            return None
        self._waiting.remove(key)
        self._computing.pop(key, None)
        self._held.pop(key, None)
        self.first_tokens.pop(key, None)
        self.first_logprobs.pop(key, None)
        sequence.state = "ended"
        self.memory.free(sequence)
        return sequence

    def plan(self, now: float) -> PrefillDecision:
        """Admit what fits, then cut the next step. The step's sequences are pinned until `finish`."""
        assert not self.under_way, "a step is under way"
        dropped = self._drop_late(now)
        self._waiting.admit(now, lambda s: self._admit(s, now), lambda s: self._reclaim(s, dropped))
        budget = self.chunk.step()
        steps: list[SequenceStep] = []
        stepping: list[Sequence] = []
        for sequence in pick_alone(self._computing.values(), self._turn):
            rows = sequence.num_rows
            if rows == 0:
                continue  # its grammar is being compiled
            rows = budget.take(sequence.num_computed, rows)
            if rows <= 0:
                break
            steps.append(sequence.step(rows))
            stepping.append(sequence)
        self._turn += 1
        if not steps:
            return PrefillDecision(None, (), tuple(dropped))
        self.under_way.begin(stepping)
        return PrefillDecision(StepPlan(tuple(steps)), tuple(stepping), tuple(dropped))

    def finish(self, plan: StepPlan, result: StepResult, now: float) -> list[Emission]:
        """Account for a step. Full blocks become findable; a finished prompt is held for its pull."""
        emissions: list[Emission] = []
        self.chunk.observe(((step.start, len(step.tokens)) for step in plan.steps), result.seconds)
        rows = zip(self.under_way.end(), plan.steps, result.tokens, strict=True)
        for place, (sequence, step, token) in enumerate(rows):
            sequence.num_computed += len(step.tokens)
            if not sequence.doomed:
                self.memory.publish(sequence, sequence.num_computed)
            self.memory.unpin(sequence)
            if self._computing.get(sequence.key) is not sequence:
                continue
            index, scores = sequence.next_index, result.scores_of(place)
            if token is None:
                if sequence.is_scored:
                    self.cancel(sequence.key)
                    emissions.append(Emission(sequence, index, None, "length", scores=scores))
                elif scores is not None:
                    emissions.append(Emission(sequence, index, None, None, scores=scores))
                continue
            sequence.append_token(token)
            reason = sequence.end_reason(token, self._limits)
            logprobs = result.logprobs_of(place)
            emissions.append(Emission(sequence, index, token, reason, logprobs, scores))
            del self._computing[sequence.key]
            if reason is not None:
                del self.sequences[sequence.key]
                sequence.enter("ended", now)
                self.memory.free(sequence)
                continue
            sequence.enter("held", now)
            self._held[sequence.key] = sequence
            self.first_tokens[sequence.key] = token
            if logprobs is not None:
                self.first_logprobs[sequence.key] = logprobs
            self.memory.move(sequence, BlockState.HELD, now, deadline=now + self._policy.lease_s)
        return emissions

    def abandon_step(self, detail: str) -> list[Dropped]:
        """The step failed: every sequence in it is given up."""
        return [Dropped(s, "error", detail) for s in self.under_way.abandon() if self.cancel(s.key) is not None]

    def expire(self, now: float) -> list[Dropped]:
        """Drop what waits past its deadline, and held KV whose lease has run out; an open pull renews the lease."""
        dropped = self._drop_late(now)
        for key in self.memory.ledger.overdue(now):
            sequence = self._held.get(key)
            if sequence is None:
                continue
            if self.has_open(key):
                self.memory.move(sequence, BlockState.HELD, now, deadline=now + self._policy.lease_s)
            else:
                self.cancel(key)
                dropped.append(Dropped(sequence, "expired"))
        return dropped

    def hold_again(self, key: Key, now: float) -> None:
        """The pull of a held sequence is gone: its lease starts now."""
        sequence = self._held.get(key)
        if sequence is not None:
            self.memory.move(sequence, BlockState.HELD, now, deadline=now + self._policy.lease_s)

    def drain(self) -> list[Dropped]:
        """Hand back what has not begun to compute."""
        return [Dropped(s, "draining") for s in self._waiting if self.cancel(s.key) is not None]

    def hand_over(self) -> list[Dropped]:
        """Hand back everything: the grace time is over."""
        return [Dropped(s, "draining") for s in list(self.sequences.values()) if self.cancel(s.key) is not None]

    def expected_s(self, sequence: Sequence) -> float:
        """Seconds until the sequence's last prompt token is computed, by the measured rate; 0 if unknown."""
        rate = self.chunk.tokens_per_s
        if rate == 0.0 or sequence.state == "held":
            return 0.0
        ahead = 0
        for other in self._computing.values():
            ahead += other.num_context - other.num_computed
            if other is sequence:
                return ahead / rate
        return (ahead + sequence.num_context) / rate

    def _drop_late(self, now: float) -> list[Dropped]:
        """Give up what still waits when its request's deadline has passed."""
        late = [s for s in self._waiting if s.deadline is not None and now >= s.deadline]
        return [Dropped(s, "deadline") for s in late if self.cancel(s.key) is not None]

    def _admit(self, sequence: Sequence, now: float) -> bool:
        if not self.memory.reserve(sequence, sequence.num_context, sequence.max_hit, BlockState.RUNNING, now):
            return False
        sequence.enter("computing", now)
        put_in_order(self._computing, sequence)
        return True

    def _reclaim(self, sequence: Sequence, dropped: list[Dropped]) -> bool:
        """Take held KV back from younger sequences, those without an open pull first, until `sequence` fits.

        Takes nothing where all of it would not be enough: what older ones hold has to end by itself.
        """
        younger = [held for held in self._held.values() if held.order > sequence.order]
        younger.sort(key=lambda held: (not self.has_open(held.key), held.order), reverse=True)
        lacking = self.memory.lacking(sequence, sequence.num_context, sequence.max_hit)
        if lacking > sum(held.num_blocks for held in younger):
            return False
        freed = False
        for victim in younger:
            if lacking <= 0:
                break
            lacking -= victim.num_blocks
            self.cancel(victim.key)
            freed = True
            dropped.append(Dropped(victim, "preempted"))
        return freed
