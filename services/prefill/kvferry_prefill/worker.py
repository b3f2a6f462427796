"""A prefill worker. The life of a request here:

1. `PrefillRequest` arrives on the bus, is checked and queued; the answer is Accepted or Rejected.
2. The scheduler reserves blocks for the whole prompt, a cached prefix among them, and computes it in chunks.
3. D opens a pull under the request's ticket, before or after that; each step's KV streams into it.
4. Token 0 is drawn by the last chunk and goes to the gateway at once.
5. The KV is held until D acknowledges, the lease runs out, or an older request needs the memory.
"""

from __future__ import annotations

from typing import ClassVar

from kvferry.schedule.sequence import Emission, Sequence
from kvferry.transport.base import Connection
from kvferry.wire.fields import Role
from kvferry.wire.work import DecodeRequest, PrefillRequest, RejectReason
from kvferry.worker.handoff.orders import AbortReason
from kvferry.worker.parts import Parts, kv_memory, model_limits
from kvferry.worker.worker import Worker
from kvferry_prefill.scheduler import PrefillDecision, PrefillScheduler
from kvferry_prefill.sender import Sender
from kvferry_prefill.settings import PrefillSettings

_ABORT_REASONS: dict[str, AbortReason] = {
    "expired": "expired",
    "preempted": "reclaimed",
    "draining": "draining",
    "stop": "ended",
    "length": "ended",
}


class PrefillWorker(Worker[PrefillScheduler]):
    role: ClassVar[Role] = "prefill"

    def __init__(self, settings: PrefillSettings, parts: Parts) -> None:
        scheduler = PrefillScheduler(kv_memory(parts.runner), model_limits(parts.runner), settings.policy)
        super().__init__(settings, parts, scheduler)
        self._stepping: tuple[Sequence, ...] = ()
        self._sender = Sender(
            scheduler,
            parts,
            self.copy_lane,
            self.tasks,
            self.metrics,
            self.digests,
            unpin=self.unpin,
            acknowledged=self._acknowledged,
        )

    def attach(self, connection: Connection) -> None:
        """A decode worker has connected."""
        self._sender.attach(connection)

    def accept(self, request: PrefillRequest | DecodeRequest, sequence: Sequence) -> RejectReason | None:
        reason = self.scheduler.add(sequence)
        if reason is None:
            self._sender.arrived(sequence)
        return reason

    def decide(self, moment: float) -> PrefillDecision:
        decision = self.scheduler.plan(moment)
        self._stepping = decision.sequences
        return decision

    def stepped(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            if emission.first:
                self.outbox.cached(emission.sequence.work, emission.sequence.cached_tokens)
            if emission.reason is not None:
                self._sender.drop(emission.sequence.key, "ended")
        for sequence in self._stepping:
            self._sender.stepped(sequence)

    def released(self, sequence: Sequence, reason: str) -> None:
        self._sender.drop(sequence.key, _ABORT_REASONS.get(reason, "cancelled"))

    def tick(self, moment: float) -> None:
        self._sender.tick(moment)

    def _acknowledged(self, sequence: Sequence) -> None:
        """D has the KV: from here on the request is D's alone."""
        self.scheduler.cancel(sequence.key)
        self.forget(sequence, "handed over")
        self.wake()
