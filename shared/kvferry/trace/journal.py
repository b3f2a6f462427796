"""What happened to one traced attempt on a worker, as spans.

    prefill, decode          the attempt on this worker, under the gateway's span of it
      prefill wait           D: until P holds memory and the transfer is due
      queue                  until memory is there: for a prefill to its first chunk, for a pull to its Fetch
      prefill chunk …        one step each, the first token drawn at the end of the last
      KV fetch …             D: from Fetch to the verified manifest; a failed one is followed by another
      KV send …, KV hold     P: from Fetch to Ack; from the first token to Ack
      generation             D: from the first token here to the end

Pure. It is written where things happen, and nowhere for a token.
"""

from __future__ import annotations

from typing import Final, Literal

from kvferry.trace.open_span import OpenSpan
from kvferry.trace.span import Value

Stage = Literal["prefill wait", "queue", "KV fetch", "KV send", "KV hold", "generation"]
MAX_CHUNK_SPANS: Final = 256  # of one attempt; later chunks are counted alone


class Journal:
    """Of one sequence. Calls about a stage that is not open, or about an attempt that is over, have no effect."""

    def __init__(self, span: OpenSpan) -> None:
        self._span = span
        self._stages: dict[Stage, OpenSpan] = {}
        self._num_computed: int | None = None  # None: no chunk yet
        self._num_chunks = 0

    def begin(self, stage: Stage, moment: float, **attributes: Value) -> None:
        if not self._span.ended:
            self.end(stage, moment)
            opened = self._stages[stage] = self._span.child(stage, moment)
            opened.set(**attributes)

    def end(self, stage: Stage, moment: float, error: str | None = None, **attributes: Value) -> None:
        if (opened := self._stages.pop(stage, None)) is not None:
            opened.set(**attributes)
            opened.end(moment, error)

    def turn(self, before: Stage, after: Stage, moment: float, **attributes: Value) -> None:
        """One stage follows on the other, if that is open."""
        if before in self._stages:
            self.end(before, moment)
            self.begin(after, moment, **attributes)

    def stepped(self, began: float, ended: float, cached: int, num_computed: int) -> None:
        """A step has ended: `num_computed` tokens are computed by now, the first `cached` of them by others."""
        if self._num_computed is None:
            if num_computed <= cached:
                return  # it was not in this step
            self.end("queue", began)
            self._num_computed = cached
        num_tokens, self._num_computed = num_computed - self._num_computed, num_computed
        if num_tokens > 0:
            self._num_chunks += 1
            if self._num_chunks <= MAX_CHUNK_SPANS:
                chunk = self._span.child("prefill chunk", began)
                chunk.set(first_token=num_computed - num_tokens, num_tokens=num_tokens)
                chunk.end(ended)

    def event(self, name: str, moment: float) -> None:
        self._span.event(name, moment)

    def close(self, moment: float, outcome: str, error: str | None = None, **attributes: Value) -> None:
        """The attempt is over here."""
        for stage in list(self._stages):
            self.end(stage, moment)
        chunks = {"num_chunks": self._num_chunks} if self._num_chunks else {}
        self._span.set(outcome=outcome, **chunks, **attributes)
        self._span.end(moment, error)
