"""What happened to each request, and when: counts, names and reasons, never a word of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from kvferry.runtime import now
from kvferry_gateway.streams.attempt import Attempt
from kvferry_gateway.streams.phase import phase_of
from kvferry_gateway.streams.stages import Course, Shares, Stage, add, shares_of
from kvferry_gateway.streams.stream import TokenStream

MAX_ENDED: Final = 128  # requests kept after their end
MAX_EVENTS: Final = 64  # of one request; the oldest go first

What = Literal["arrived", "placed", "accepted", "first token", "lost", "ended"]


@dataclass(frozen=True, slots=True)
class Event:
    at: float  # of the loop's clock
    what: What
    facts: dict[str, Any]  # as JSON has them


@dataclass(eq=False, slots=True)
class Timeline:
    """Of one unit: one choice of a request."""

    number: int  # the unit's
    request_id: str
    model: str
    choice: int
    num_prompt: int
    since: float
    stream: TokenStream | None  # None: it has ended, and nothing of its text is kept
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    attempt: Attempt | None = None  # the latest; None before the first, and after the end
    num_attempts: int = 0  # so far; the latest bears this number in the events
    outcome: str | None = None  # why it ended
    ended_at: float | None = None
    _num_tokens: int = 0
    _free_since: float = 0.0  # the loss of the latest attempt that was lost, else the arrival
    _shares: Shares = field(default_factory=dict)  # until then; all of them, once it has ended

    def __post_init__(self) -> None:
        self._free_since = self.since

    @property
    def num_tokens(self) -> int:
        """Generated so far, by all attempts."""
        return self._num_tokens if self.stream is None else len(self.stream.tokens)

    def note(self, what: What, **facts: Any) -> None:
        self.events.append(Event(now(), what, facts))

    def placed(self, attempt: Attempt) -> None:
        """Workers were chosen and are asked now."""
        self.attempt = attempt
        self.num_attempts += 1
        prefill = attempt.prefill
        self.note(
            "placed", attempt=self.num_attempts, decode=attempt.decode.name,
            prefill=None if prefill is None else prefill.name, **asdict(attempt.forecast.reason),
        )  # fmt: skip

    def accepted(self) -> None:
        """By all of the attempt's workers."""
        self.note("accepted", attempt=self.num_attempts)

    def lost(self, reason: str) -> None:
        """The attempt is over and the choice is not complete."""
        moment = now()
        self.note("lost", attempt=self.num_attempts, reason=reason)
        self._shares = self._until(moment, lost=True)
        self.attempt, self._free_since = None, moment

    def told(self) -> Iterable[Event]:
        """What is known by now, in order. The first token is noted by its stream alone: it is the hot path."""
        stream = self.stream
        if stream is None or stream.first_token_at is None:
            return self.events
        return sorted((*self.events, Event(stream.first_token_at, "first token", {})), key=lambda event: event.at)

    def shares(self, moment: float) -> Shares:
        """Where its time went until now, or until its end."""
        return self._shares if self.ended_at is not None else self._until(moment)

    def _until(self, moment: float, *, lost: bool = False) -> Shares:
        attempt, shares = self.attempt, self._shares.copy()
        placed_at = moment if attempt is None else attempt.forecast.placed_at
        add(shares, {"placement": placed_at - self._free_since})
        if attempt is not None:
            add(shares, shares_of(course_of(attempt, moment, lost=lost)))
        return shares

    def end(self, outcome: str) -> None:
        assert self.stream is not None, "it ends once"
        self.events = deque(self.told(), MAX_EVENTS)
        self._num_tokens = len(self.stream.tokens)
        self.outcome, self.ended_at = outcome, now()
        self._shares = self._until(self.ended_at)
        self.note("ended", outcome=outcome, num_tokens=self._num_tokens)
        self.stream = self.attempt = None


def course_of(attempt: Attempt, moment: float, *, lost: bool) -> Course:
    asked: Stage = "placement" if not attempt.accepted else "queue" if phase_of(attempt) == "queued" else "prefill"
    computed = attempt.spent.get(attempt.scorer.incarnation)
    drawn = None if attempt.prefill is None else attempt.spent.get(attempt.decode.incarnation)
    return Course(
        placed_at=attempt.forecast.placed_at,
        until=moment,
        pulls=attempt.prefill is not None,
        waits_in="lost" if lost else asked,
        first_token_at=attempt.forecast.first_token_at,
        computed=None if computed is None else computed[1],
        drawn_at=None if drawn is None else drawn[0],
        drawn=None if drawn is None else drawn[1],
        running=attempt.running,
    )


class Timelines:
    """Those of the requests under way, and of the latest that ended."""

    def __init__(self) -> None:
        self._live: dict[int, Timeline] = {}  # by number
        self._ended: deque[Timeline] = deque(maxlen=MAX_ENDED)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def begin(
        self, number: int, request_id: str, model: str, choice: int, num_prompt: int, stream: TokenStream
    ) -> Timeline:
        timeline = self._live[number] = Timeline(number, request_id, model, choice, num_prompt, now(), stream)
        timeline.note("arrived", prompt_tokens=num_prompt)
        return timeline

    def end(self, timeline: Timeline, outcome: str) -> None:
        """Without effect the second time."""
        if self._live.pop(timeline.number, None) is not None:
            timeline.end(outcome)
            self._ended.append(timeline)

    def live(self) -> Iterator[Timeline]:
        """The oldest first."""
        return iter(self._live.values())

    def ended(self) -> Iterator[Timeline]:
        """The latest first."""
        return reversed(self._ended)

    def find(self, number: int) -> Timeline | None:
        found = self._live.get(number)
        return found or next((timeline for timeline in self._ended if timeline.number == number), None)
