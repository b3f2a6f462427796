"""Which trace a request belongs to, as its client's headers say (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvferry.wire.work import MAX_TRACE_STATE_CHARS, TraceContext

SAMPLED: Final = 1  # the flag of `traceparent`: the caller records this trace
# version - trace id - parent id - flags; neither id may be zero, and a later version may add parts.
_TRACEPARENT: Final = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_STATE: Final = re.compile(rb"[ -~\t]{1,%d}" % MAX_TRACE_STATE_CHARS)


@dataclass(frozen=True, slots=True)
class Caller:
    """The span that the request was made in, and whether its trace is recorded."""

    context: TraceContext
    sampled: bool


def caller_of(headers: Iterable[tuple[bytes, bytes]]) -> Caller | None:
    """None without a `traceparent`, or with one that can't be read: a new trace begins. Names are in lower case."""
    given = list(headers)
    parents = [value for name, value in given if name == b"traceparent"]
    if len(parents) != 1 or (found := _TRACEPARENT.fullmatch(parents[0].strip())) is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == b"00" and more is not None:
        return None
    state = b",".join(value.strip() for name, value in given if name == b"tracestate")
    context = TraceContext(
        bytes.fromhex(trace_id.decode()),
        bytes.fromhex(span_id.decode()),
        state.decode() if _STATE.fullmatch(state) else "",
    )
    return Caller(context, bool(int(flags, 16) & SAMPLED))
