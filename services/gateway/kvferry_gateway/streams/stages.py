"""Where the time of a request went: a share for each stage, of all its attempts. Pure.

    arrived ─placement─> placed ─queue, prefill, messages─> first token ─transfer─ first step─> D's own ─decode─> ended

The shares are of the client's time: what goes on beside another stage, as most of a transfer beside its prefill, is in
that one. Workers tell exact times with the first token that they draw (`Spent`); what they don't tell is prefill before
the first token, and after it transfer until the decode worker runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from kvferry.wire.tokens import Spent

Stage = Literal["placement", "queue", "prefill", "messages", "transfer", "first step", "decode", "lost"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)  # in their order
Shares = dict[Stage, float]  # seconds


@dataclass(frozen=True, slots=True)
class Course:
    """How far one attempt has come. Times are of the gateway's loop clock."""

    placed_at: float
    until: float  # now, or when it was over
    pulls: bool  # KV goes from P to D
    waits_in: Stage  # what the time until now was, if no token has come
    first_token_at: float | None
    computed: Spent | None  # as told by who computed the prompt
    drawn_at: float | None  # when a D that pulls gave the first token of its own
    drawn: Spent | None  # as it told with that token
    running: bool  # D needs P no more


def shares_of(course: Course) -> Shares:
    """Their sum is the time from `placed_at` until `until`."""
    first = course.first_token_at
    if first is None:
        return {course.waits_in: course.until - course.placed_at}
    return _before(course, first - course.placed_at) | _after(course, first)


def _before(course: Course, seconds: float) -> Shares:
    if course.computed is None:
        return {"prefill": seconds}
    prefill = min(seconds, course.computed.computing_s)
    queue = min(seconds - prefill, course.computed.waiting_s)
    return {"queue": queue, "prefill": prefill, "messages": seconds - prefill - queue}


def _after(course: Course, first: float) -> Shares:
    if not course.pulls:
        return {"decode": course.until - first}
    if course.drawn is None or course.drawn_at is None:
        return {"decode" if course.running else "transfer": course.until - first}
    drawn_at = max(first, course.drawn_at)
    step = min(drawn_at - first, course.drawn.step_s)
    return {"transfer": drawn_at - first - step, "first step": step, "decode": course.until - drawn_at}


def add(shares: Shares, more: Shares) -> None:
    for stage, seconds in more.items():
        shares[stage] = shares.get(stage, 0.0) + seconds
