"""The journals of the attempts on this worker whose traces are recorded. Others, and tokens, cost nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvferry.runtime import now
from kvferry.schedule.sequence import Key, Sequence
from kvferry.trace.journal import Journal
from kvferry.trace.tracer import Tracer

if TYPE_CHECKING:
    from kvferry.worker.worker import Worker

# How an attempt ends here when all is well, or when another was to go first.
HARMLESS: Final = frozenset({"stop", "length", "handed over", "ended", "cancelled", "preempted", "draining", "expired"})


class Traces:
    """Of one worker. Only the event loop calls it."""

    def __init__(self, worker: Worker[Any], tracer: Tracer | None) -> None:
        self._worker = worker
        self._tracer = tracer
        self._prefilling: dict[Key, Sequence] = {}  # queued for a prefill here, or in it

    def accepted(self, sequence: Sequence) -> None:
        """A request was queued."""
        work, moment = sequence.work, now()
        if self._tracer is None or work.trace is None:
            return
        span = self._tracer.follow(work.trace, self._worker.role, moment)
        span.set(
            worker=self._worker.settings.name, request_id=work.request_id, choice=work.choice, attempt=work.attempt,
            context_tokens=sequence.num_context,
        )  # fmt: skip
        sequence.journal = Journal(span)
        if sequence.state == "opening":
            sequence.journal.begin("prefill wait", moment)
            return
        sequence.journal.begin("queue", moment)
        self._prefilling[sequence.key] = sequence

    def stepped(self, began: float) -> None:
        """A step has ended, and its scheduler knows."""
        if not self._prefilling:
            return
        moment = now()
        for key, sequence in list(self._prefilling.items()):
            journal = sequence.journal
            assert journal is not None, "it is traced"
            journal.stepped(began, moment, sequence.cached_tokens, sequence.num_computed)
            if sequence.num_computed >= sequence.num_context:
                del self._prefilling[key]
                if sequence.num_tokens > sequence.num_context:
                    journal.event("first token", moment)
                if sequence.state == "held":
                    journal.begin("KV hold", moment)
                elif sequence.state == "running":
                    journal.begin("generation", moment)

    def ended(self, sequence: Sequence, outcome: str) -> None:
        """The attempt is over on this worker."""
        if (journal := sequence.journal) is None:
            return
        self._prefilling.pop(sequence.key, None)
        journal.close(
            now(), outcome, None if outcome in HARMLESS else outcome,
            cached_tokens=sequence.cached_tokens, tokens=sequence.num_tokens - sequence.num_context,
        )  # fmt: skip
