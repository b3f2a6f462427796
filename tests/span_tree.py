"""Spans as the tree that they make up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvferry.trace.span import Span


class Tree:
    """The spans of one trace. Fails the test if their parents make no single tree below `above`."""

    def __init__(self, spans: Iterable[Span], above: bytes | None = None, *, num_dead: int = 0) -> None:
        """`above`: the client's span id, where it told one. `num_dead`: processes that died before they told of the
        attempt's span there; its stages that had ended by then are left out, as `orphans`."""
        found = list(spans)
        ids = {span.context.span_id for span in found} | {above, None}
        self.orphans = [span for span in found if span.parent not in ids]
        assert len({span.parent for span in self.orphans}) <= num_dead, self.orphans
        self.spans = [span for span in found if span.parent in ids]
        self._by_id = {span.context.span_id: span for span in self.spans}
        assert len(self._by_id) == len(self.spans), "an id is given twice"
        assert len({span.context.trace_id for span in self.spans}) == 1
        (self.root,) = (span for span in self.spans if span.parent == above)
        for span in self.spans:
            assert self.path(span).startswith(self.root.name), f"{span.name} hangs in the air"

    def path(self, span: Span) -> str:
        """Its name behind those of its ancestors."""
        parent = None if span is self.root or span.parent is None else self._by_id.get(span.parent)
        return span.name if parent is None else f"{self.path(parent)} > {span.name}"

    @property
    def shape(self) -> Counter[str]:
        """How many spans there are at each path below the root's."""
        return Counter(self.path(span).removeprefix(f"{self.root.name} > ") for span in self.spans)

    def named(self, name: str) -> Sequence[Span]:
        """In the order in which they began."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.began)

    def one(self, name: str) -> Span:
        (span,) = self.named(name)
        return span

    def children(self, parent: Span) -> Sequence[Span]:
        found = [span for span in self.spans if span.parent == parent.context.span_id]
        return sorted(found, key=lambda span: span.began)

    def check_times(self, slack_s: float) -> None:
        """No span ends before it begins, or lies outside its parent by more than clocks may differ."""
        for span in self.spans:
            assert span.began <= span.ended, span
            for child in self.children(span):
                assert child.began >= span.began - slack_s, (span, child)
                assert child.ended <= span.ended + slack_s, (span, child)
