"""A decode worker. The life of a request here:

1. `DecodeRequest` arrives on the bus, is checked and queued. With a prefill address D opens the hand-off at
   once; without one the prompt is computed here, in chunks beside the running batch.
2. P's progress tells when to reserve: prompt + 1, a cached prefix among it. Then D fetches what it lacks.
3. Each frame is checked and scattered; when all have come and the manifest fits, the sequence may run.
4. D acknowledges, repeats token 0 to the gateway, and decodes with continuous batching.
5. The end goes to the gateway, again and again until it is confirmed.
"""

from __future__ import annotations

from typing import ClassVar

from kvferry.runtime import now
from kvferry.schedule.sequence import Dropped, Emission, Key, Sequence
from kvferry.schedule.step import StepPlan
from kvferry.transport.base import Connection
from kvferry.transport.pool import ConnectionPool
from kvferry.wire.beats import PullTime
from kvferry.wire.fields import Role
from kvferry.wire.tokens import EndReason
from kvferry.wire.work import DecodeRequest, PrefillRequest, RejectReason
from kvferry.worker.parts import Parts, kv_memory, model_limits
from kvferry.worker.worker import Worker
from kvferry_decode.puller import Puller, Receiver
from kvferry_decode.scheduler import DecodeDecision, DecodeScheduler
from kvferry_decode.settings import DecodeSettings
from kvferry_decode.verdict import Right


class DecodeWorker(Worker[DecodeScheduler], Receiver):
    role: ClassVar[Role] = "decode"

    def __init__(self, settings: DecodeSettings, parts: Parts) -> None:
        scheduler = DecodeScheduler(kv_memory(parts.runner), model_limits(parts.runner), settings.policy)
        super().__init__(settings, parts, scheduler)
        self._connections = ConnectionPool(parts.transport)
        self._puller = Puller(
            self._connections, parts, self.copy_lane, self.tasks, self.metrics, self.digests, settings.pull_policy, self
        )

    def attach(self, connection: Connection) -> None:
        """KV flows only from P to D: nobody has a reason to connect here."""
        connection.abort()

    async def disconnect(self) -> None:
        self._puller.close()
        await self._connections.close()

    def accept(self, request: PrefillRequest | DecodeRequest, sequence: Sequence) -> RejectReason | None:
        assert isinstance(request, DecodeRequest)
        address = request.prefill
        parts = None if address is None else self._puller.parts(address)
        if address is not None and parts is None:
            return "malformed"
        reason = self.scheduler.add(sequence, pull=address is not None)
        if reason is None and address is not None and parts is not None:
            self._puller.open(sequence, address, parts)
        return reason

    def decide(self, moment: float) -> DecodeDecision:
        decision = self.scheduler.plan(moment)
        decoding = decision.plan is not None and self.scheduler.num_running > 0
        self._puller.begin_step(self.engine_loop.step_s if decoding else None)
        for sequence in decision.fetch:
            self._puller.fetch(sequence)
        return decision

    def decide_ahead(self) -> StepPlan | None:
        plan = self.scheduler.plan_ahead()
        if plan is not None:
            self._puller.begin_step(self.engine_loop.step_s)
        return plan

    def stepped(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            if emission.first:
                self.outbox.cached(emission.sequence.work, emission.sequence.cached_tokens)

    def released(self, sequence: Sequence, reason: str) -> None:
        self._puller.drop(sequence.key)

    def progress(self, sequence: Sequence) -> tuple[int, int]:
        return self._puller.progress(sequence.key) if sequence.state == "fetching" else super().progress(sequence)

    def take_pulls(self) -> tuple[PullTime, ...]:
        return self._puller.take_times()

    def tick(self, moment: float) -> None:
        self._puller.tick(moment)

    # -- what becomes of pulls -------------------------------------------------------------------------------

    def pin(self, sequence: Sequence) -> None:
        self.scheduler.memory.pin(sequence)

    def due(self, key: Key) -> None:
        sequence = self.scheduler.due(key)
        if sequence is not None and sequence.journal is not None:
            sequence.journal.turn("prefill wait", "queue", now())
        self.wake()

    def fetched(self, sequence: Sequence, first: Right, cached_tokens: int) -> None:
        emission = self.scheduler.fetched(sequence.key, first.token, now(), first.logprobs)
        if emission is not None:
            self.outbox.cached(sequence.work, max(cached_tokens, sequence.cached_tokens))
            if sequence.journal is not None:
                sequence.journal.begin("generation", now())
            self.emit(emission)
            self.post.wake()
            self.wake()

    def failed(self, key: Key, reason: EndReason | None, detail: str) -> None:
        sequence = self.scheduler.cancel(key)
        if sequence is None:
            return
        if reason is None:
            self.forget(sequence, detail)
        else:
            self.drop(Dropped(sequence, reason, detail))
        self.wake()
