"""Which trace a request belongs to, by W3C's rules; OpenTelemetry's own reader is the judge."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvferry.trace.context import caller_of
from kvferry.wire.work import MAX_TRACE_STATE_CHARS, TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def headers(parent: str, *states: str) -> list[tuple[bytes, bytes]]:
    return [(b"traceparent", parent.encode()), *((b"tracestate", state.encode()) for state in states)]


def test_the_callers_span_becomes_the_parent() -> None:
    caller = caller_of(headers(PARENT, "congo=t61rcWkgMzE", " rojo=1"))
    assert caller is not None
    assert caller.sampled
    assert caller.context == TraceContext(bytes.fromhex(TRACE), bytes.fromhex(SPAN), "congo=t61rcWkgMzE,rojo=1")


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("ff", True)])
def test_the_flag_says_whether_the_caller_records_it(flags: str, sampled: bool) -> None:
    caller = caller_of(headers(PARENT[:-2] + flags))
    assert caller is not None
    assert caller.sampled is sampled


@pytest.mark.parametrize(
    "parent",
    [
        "", "00", PARENT[:-1], PARENT + "-more", PARENT.upper(), PARENT.replace("00-", "ff-", 1), PARENT + "0",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", PARENT.replace("4b", "4g"), "01" + PARENT[2:] + "more",
    ],
)  # fmt: skip
def test_what_cannot_be_read_begins_a_new_trace(parent: str) -> None:
    assert caller_of(headers(parent)) is None


def test_a_later_version_may_have_more_parts() -> None:
    assert caller_of(headers("01" + PARENT[2:] + "-more")) == caller_of(headers("01" + PARENT[2:]))
    assert caller_of(headers("01" + PARENT[2:])) is not None


def test_two_parents_are_none() -> None:
    assert caller_of([*headers(PARENT), *headers(PARENT)]) is None
    assert caller_of([]) is None


@pytest.mark.parametrize("state", ["a=" + "b" * MAX_TRACE_STATE_CHARS, "a=\x7f", "a=é", ""])
def test_a_state_that_is_too_long_or_no_text_is_not_passed_on(state: str) -> None:
    caller = caller_of(headers(PARENT, state))
    assert caller is not None
    assert caller.context.state == ""


def judged(parent: str) -> tuple[int, int, bool] | None:
    """What OpenTelemetry makes of a header."""
    context = TraceContextTextMapPropagator().extract({"traceparent": parent})
    found = trace.get_current_span(context).get_span_context()
    return (found.trace_id, found.span_id, found.trace_flags.sampled) if found.is_valid else None


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from("0123456789abcdefgF- \t")), max_size=3), st.booleans())
@example([], True)
def test_every_header_is_read_as_opentelemetry_reads_it(changes: list[tuple[int, str]], cut: bool) -> None:
    letters = list(PARENT)
    for place, letter in changes:
        letters[min(place, len(letters) - 1)] = letter
        if cut and place > 50:
            letters.append(letter)
    parent = "".join(letters)
    caller = caller_of(headers(parent))
    mine = caller and (
        int.from_bytes(caller.context.trace_id), int.from_bytes(caller.context.span_id), caller.sampled
    )  # fmt: skip
    assert mine == judged(parent)
