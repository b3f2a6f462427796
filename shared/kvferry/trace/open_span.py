"""A span under way. Pure: instants are given, those of the event loop's clock."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvferry.trace.span import Event, Kind, Span, Value
from kvferry.wire.work import TraceContext


class SpanBook(ABC):
    """Where spans get their ids, and go when they have ended. The tracer is one."""

    @abstractmethod
    def child_of(self, parent: TraceContext) -> TraceContext:
        """Of a new span in the same trace."""

    @abstractmethod
    def unix_offset(self) -> float:
        """What makes Unix seconds of an instant of the loop's clock, now."""

    @abstractmethod
    def tell(self, span: Span) -> None:
        """It has ended."""


class OpenSpan:
    """A span under way."""

    __slots__ = ("_began", "_book", "_events", "_kind", "_name", "_parent", "attributes", "context", "ended")

    def __init__(
        self, book: SpanBook, name: str, context: TraceContext, parent: bytes | None, began: float, kind: Kind
    ) -> None:
        self.context = context
        self.ended = False
        self.attributes: dict[str, Value] = {}
        self._book = book
        self._name = name
        self._parent = parent
        self._began = began
        self._kind = kind
        self._events: list[tuple[str, float]] = []

    def child(self, name: str, moment: float, kind: Kind = "internal") -> OpenSpan:
        return OpenSpan(self._book, name, self._book.child_of(self.context), self.context.span_id, moment, kind)

    def set(self, **attributes: Value | None) -> None:
        """Attributes of ours, told as `kvferry.…`; None is not told."""
        self.attributes |= {f"kvferry.{name}": value for name, value in attributes.items() if value is not None}

    def set_standard(self, attributes: dict[str, Value | None]) -> None:
        """Attributes by their names in OpenTelemetry's conventions."""
        self.attributes |= {name: value for name, value in attributes.items() if value is not None}

    def event(self, name: str, moment: float) -> None:
        self._events.append((name, moment))

    def end(self, moment: float, error: str | None = None) -> None:
        """Without effect the second time."""
        if self.ended:
            return
        self.ended = True
        offset = self._book.unix_offset()
        events = tuple(Event(name, at + offset) for name, at in self._events)
        self._book.tell(
            Span(
                self._name, self.context, self._parent, self._kind, self._began + offset, moment + offset,
                self.attributes, events, error,
            )
        )  # fmt: skip
