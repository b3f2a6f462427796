"""A span that has ended, and where ended spans go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvferry.wire.work import TraceContext

# Never a word of a prompt or an output, nor a label of a user: counts, names of ours, reasons.
Value: TypeAlias = str | bool | int | float | tuple[str, ...]
Attributes: TypeAlias = Mapping[str, Value]
Kind = Literal["internal", "server", "client"]  # server: its parent is in another process


@dataclass(frozen=True, slots=True)
class Event:
    """Something without a duration."""

    name: str
    at: float  # Unix seconds


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    context: TraceContext  # its own
    parent: bytes | None  # span id; None: the trace begins here
    kind: Kind
    began: float  # Unix seconds
    ended: float
    attributes: Attributes
    events: tuple[Event, ...] = ()
    error: str | None = None  # why it failed


class SpanExporter(ABC):
    """Takes spans out of the process. Called on a lane of its own."""

    @abstractmethod
    def export(self, spans: Sequence[Span]) -> bool:
        """Blocks. False: these spans are lost. Never raises."""

    @abstractmethod
    def close(self) -> None:
        """From another thread: none follows. An export under way may go on; its lane is a daemon."""


class MemoryExporter(SpanExporter):
    """The twin: keeps the spans, or loses them while `broken`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.broken = False
        self.closed = False

    def export(self, spans: Sequence[Span]) -> bool:
        if not self.broken:
            self.spans.extend(spans)
        return not self.broken

    def close(self) -> None:
        self.closed = True
