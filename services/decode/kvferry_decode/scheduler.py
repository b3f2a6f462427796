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
from kvferry.schedule.queue import AdmissionQueue, to_displace
from kvferry.schedule.sequence import Dropped, Emission, Key, ModelLimits, Sequence, pick_alone, put_in_order
from kvferry.schedule.step import SequenceStep, StepPlan, StepResult
from kvferry.schedule.under_way import StepsUnderWay
from kvferry.wire.logprobs import PromptLogprobs, TokenLogprobs
from kvferry.wire.work import RejectReason


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
        self.under_way = StepsUnderWay(memory)
        self._turn = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._opening)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def queued_tokens(self) -> tuple[int, ...]:
        """Prompt tokens that this worker has to compute itself, queued or under way, by priority class."""
        own = (sequence for sequence in self._waiting if sequence.key not in self._pulls)
        return self.memory.uncomputed(own, self._computing.values())

    def add(self, sequence: Sequence, pull: bool) -> RejectReason | None:
        """Take a sequence: `pull` fetches its KV once `due`, otherwise it is computed here."""
        if sequence.num_context >= self._limits.max_model_len:
            return "too_long"
        # Alone on this worker it must reach its end, or it would be preempted for ever.
        most = min(sequence.max_tokens_held, self._limits.max_model_len)
        if self.memory.blocks_for(max(sequence.num_context + 1, most)) > self.memory.pool.num_blocks:
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

    def displace(self, urgent: Sequence) -> Dropped | None:
        """Give up a queued sequence for one that the full queue has refused, if one has a lower priority."""
        victim = to_displace((*self._waiting, *self._opening.values()), urgent)
        if victim is None:
            return None
        self.cancel(victim.key)
        return Dropped(victim, "preempted")

    def due(self, key: Key) -> Sequence | None:
        """P holds memory and the time has come to reserve. The sequence if that is news."""
        sequence = self._opening.pop(key, None)
        if sequence is not None:
            self._pulls[key] = None
            self._waiting.add(sequence)
        return sequence

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

    def fetched(self, key: Key, token: int, now: float, logprobs: TokenLogprobs | None = None) -> Emission | None:
        """The pull is verified: the sequence may run, from its first token. None if it is gone."""
        sequence = self._fetching.pop(key, None)
        if sequence is None:
            return None
        sequence.num_computed = sequence.num_context
        self.memory.publish(sequence, sequence.num_context)
        return self._started(sequence, token, now, logprobs)

    def plan(self, now: float) -> DecodeDecision:
        """Grow what runs, admit what fits, cut the next step. Its sequences are pinned until `finish`."""
        assert not self.under_way, "a step is under way"
        dropped = self._drop_late(now)
        ready = self._grow_running(dropped)
        fetch: list[Sequence] = []
        self._waiting.admit(now, lambda s: self._admit(s, now, fetch), lambda s: self._reclaim(s, dropped))
        chosen = pick_alone((*ready, *self._computing.values()), self._turn)
        self._turn += 1
        budget = self.chunk.step(num_decoding=len(ready))
        steps: list[SequenceStep] = []
        stepping: list[Sequence] = []
        for sequence in chosen:
            if sequence.key not in self.sequences:
                continue  # preempted by an older one after it had grown
            rows = sequence.num_rows
            if rows == 0:
                continue  # its grammar is being compiled
            if sequence.state != "running":
                rows = budget.take(sequence.num_computed, rows)
            if rows <= 0:
                break
            steps.append(sequence.step(rows))
            stepping.append(sequence)
        if not steps:
            return DecodeDecision(None, tuple(fetch), tuple(dropped))
        self.under_way.begin(stepping)
        return DecodeDecision(StepPlan(tuple(steps)), tuple(fetch), tuple(dropped))

    def plan_ahead(self) -> StepPlan | None:
        """The step behind the one that is under way, as if no token that is being drawn ended its sequence: the engine
        need not wait for a decision then. A sequence that has ended all the same gets nothing from it.

        None where more may be to decide than that: if anything but decoding is to be done, or if there is no block.
        """
        if len(self.under_way) > 1 or self._waiting or self._computing:
            return None
        stepping, running = set(self.under_way.newest), self._running.values()
        if not all(sequence in stepping and sequence.runs_freely for sequence in running):
            return None
        going_on = [sequence for sequence in running if sequence.goes_on(self._limits)]
        if not going_on or not all(self.memory.grow(sequence, 1) for sequence in going_on):
            return None
        self.under_way.begin(going_on)
        return StepPlan(tuple(sequence.step_ahead() for sequence in going_on))

    def finish(self, plan: StepPlan, result: StepResult, now: float) -> list[Emission]:
        """Account for a step: tokens are appended, full blocks become findable, ended sequences freed."""
        emissions: list[Emission] = []
        prefilled = [(step.start, len(step.tokens)) for step in plan.steps if len(step.tokens) > 1]
        if prefilled:
            self.chunk.observe(prefilled, result.seconds)
        rows = zip(self.under_way.end(), plan.steps, result.tokens, strict=True)
        for place, (sequence, step, token) in enumerate(rows):
            sequence.num_computed += len(step.tokens)
            if not sequence.doomed:
                self.memory.publish(sequence, sequence.num_computed)
            self.memory.unpin(sequence)
            if self.sequences.get(sequence.key) is not sequence:
                continue
            scores = result.scores_of(place)
            if token is not None:
                self._computing.pop(sequence.key, None)
                emissions.append(self._started(sequence, token, now, result.logprobs_of(place), scores))
            elif sequence.is_scored:
                self.cancel(sequence.key)
                emissions.append(Emission(sequence, sequence.next_index, None, "length", scores=scores))
            elif scores is not None:
                emissions.append(Emission(sequence, sequence.next_index, None, None, scores=scores))
        return emissions

    def abandon_step(self, detail: str) -> list[Dropped]:
        """The step failed, and what was planned on it: every sequence in it is given up."""
        return [Dropped(s, "error", detail) for s in self.under_way.abandon() if self.cancel(s.key) is not None]

    def expire(self, now: float) -> list[Dropped]:
        """Drop what waits past its deadline, and pulls that did not end in time."""
        dropped = self._drop_late(now)
        late = [self._fetching[key] for key in self.memory.ledger.overdue(now) if key in self._fetching]
        return dropped + [
            Dropped(s, "transfer_failed", "pull deadline") for s in late if self.cancel(s.key) is not None
        ]

    def drain(self) -> list[Dropped]:
        """Hand back what does not run yet."""
        early = (*self._waiting, *self._opening.values(), *self._fetching.values(), *self._computing.values())
        return [Dropped(s, "draining") for s in early if self.cancel(s.key) is not None]

    def hand_over(self) -> list[Dropped]:
        """Hand back everything: the grace time is over."""
        return [Dropped(s, "draining") for s in list(self.sequences.values()) if self.cancel(s.key) is not None]

    def _drop_late(self, now: float) -> list[Dropped]:
        """Give up what still waits when its request's deadline has passed."""
        queued = (*self._waiting, *self._opening.values())
        late = [s for s in queued if s.deadline is not None and now >= s.deadline]
        return [Dropped(s, "deadline") for s in late if self.cancel(s.key) is not None]

    def _started(
        self,
        sequence: Sequence,
        token: int,
        now: float,
        logprobs: TokenLogprobs | None,
        scores: PromptLogprobs | None = None,
    ) -> Emission:
        """Append a drawn token to a sequence whose context is computed."""
        index = sequence.next_index
        sequence.append_token(token)
        reason = sequence.end_reason(token, self._limits)
        if reason is not None:
            sequence.enter("ended", now)
            self.cancel(sequence.key)
        elif sequence.state != "running":
            sequence.enter("running", now)
            self._running[sequence.key] = sequence
            self.memory.move(sequence, BlockState.RUNNING, now)
        return Emission(sequence, index, token, reason, logprobs, scores)

    def _grow_running(self, dropped: list[Dropped]) -> list[Sequence]:
        """A block for every running sequence's next row, oldest first; the sequences that may step."""
        ready: list[Sequence] = []
        for sequence in sorted(self._running.values(), key=lambda item: item.order):
            if sequence.key not in self._running:
                continue
            while not self.memory.grow(sequence):
                if self.memory.num_doomed:
                    break  # memory is on its way back already: nobody else has to give any
                victim = self._victim(sequence)
                self._preempt(victim or sequence, dropped)
                if victim is None:
                    break
            else:
                ready.append(sequence)
        return ready

    def _admit(self, sequence: Sequence, now: float, fetch: list[Sequence]) -> bool:
        if self._num_holders >= self._policy.max_num_seqs:
            return False
        pull = sequence.key in self._pulls
        reserved = self.memory.reserve(
            sequence,
            sequence.num_context + 1,
            self._max_hit(sequence),
            state=BlockState.FETCHING if pull else BlockState.RUNNING,
            now=now,
            deadline=now + self._policy.pull_deadline_s if pull else None,
            watermark=self._watermark,
        )
        if not reserved:
            return False
        if pull:
            del self._pulls[sequence.key]
            sequence.enter("fetching", now)
            self._fetching[sequence.key] = sequence
            fetch.append(sequence)
        else:
            sequence.enter("computing", now)
            put_in_order(self._computing, sequence)
        return True

    @property
    def _num_holders(self) -> int:
        return len(self._running) + len(self._fetching) + len(self._computing)

    @property
    def _watermark(self) -> int:
        """Room for growth; an idle worker has nobody who grows."""
        return self._policy.watermark_blocks if self._num_holders else 0

    def _max_hit(self, sequence: Sequence) -> int:
        return sequence.num_context if sequence.key in self._pulls else sequence.max_hit

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Whose memory an older `sequence` may take to grow: the youngest that fetches or computes, else that runs."""
        stages = ((*self._fetching.values(), *self._computing.values()), tuple(self._running.values()))
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
        """Take memory back from younger pulls and local prefills, if that makes room for `sequence`."""
        if self._num_holders >= self._policy.max_num_seqs:
            return False
        younger = [
            other for other in (*self._fetching.values(), *self._computing.values()) if other.order > sequence.order
        ]
        lacking = self.memory.lacking(sequence, sequence.num_context + 1, self._max_hit(sequence), self._watermark)
        if lacking > sum(other.num_blocks for other in younger):
            return False
        freed = False
        for victim in sorted(younger, key=lambda item: item.order, reverse=True):
            if lacking <= 0:
                break
            lacking -= victim.num_blocks
            self._preempt(victim, dropped)
            freed = True
        return freed
