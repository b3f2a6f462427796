"""Per-key rate limits: what a key may still ask for in this minute. Pure: the caller tells the time.

A limit is a token bucket (ITU-T I.371): it starts full with one minute's worth and regains that much in each minute,
evenly. So no span of t seconds holds more than limit · (1 + t / 60).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

from kvferry_gateway.errors import rate_limited, too_many_tokens_asked

MINUTE: Final = 60.0  # seconds

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Of one key, in a minute. None: no limit."""

    requests: int | None = None
    tokens: int | None = None


NO_LIMITS: Final = RateLimits()


@dataclass(eq=False, slots=True)
class Charge:
    """Taken at once, before it is known how much will be used."""

    amount: int
    low: float = math.inf  # least that was missing in the bucket from this charge to the next one


class Bucket:
    """`limit` at most, and so much again in a minute. Times are seconds of one clock that never goes back."""

    def __init__(self, limit: int) -> None:
        self.limit: Final = limit
        self._missing = 0.0  # at `_at`
        self._at = 0.0
        self._open: dict[Charge, None] = {}  # not settled, in the order of their taking

    def missing(self, now: float) -> float:
        """What has been taken and not regained."""
        return max(0.0, self._missing - (now - self._at) * self.limit / MINUTE)

    def remaining(self, now: float) -> int:
        return max(0, math.floor(self.limit - self.missing(now)))

    def refilled_in(self, now: float) -> float:
        """Seconds until it is full."""
        return self.missing(now) * MINUTE / self.limit

    def wait(self, amount: int, now: float) -> float:
        """Seconds until `amount`, at most `limit`, is there; 0: now."""
        return max(0.0, (self.missing(now) + amount - self.limit) * MINUTE / self.limit)

    def take(self, amount: int, now: float) -> None:
        """For good. Call it when `wait` is 0."""
        missing = self.missing(now)
        self._note_low(missing)
        self._missing, self._at = missing + amount, now

    def charge(self, amount: int, now: float) -> Charge:
        """As `take`, until `settle` gives back what was not used."""
        self.take(amount, now)
        charge = Charge(amount)
        self._open[charge] = None
        return charge

    def settle(self, charge: Charge, used: int, now: float) -> None:
        """Afterwards the bucket is as if only `used` had been taken, at the time of the charge.

        So what it has regained since does not come back twice: from a bucket near full, it would have run over.
        """
        missing = self.missing(now)
        self._note_low(missing)
        order = list(self._open)
        place = order.index(charge)
        back = float(max(0, charge.amount - used))
        for later in order[place:]:
            back = min(back, later.low)
            later.low -= back
        self._missing, self._at = missing - back, now
        if place:
            order[place - 1].low = min(order[place - 1].low, charge.low)
        del self._open[charge]

    def _note_low(self, missing: float) -> None:
        if self._open:
            latest = next(reversed(self._open))
            latest.low = min(latest.low, missing)


@dataclass(eq=False, slots=True)
class Allowance:
    """One key's two buckets."""

    limits: RateLimits
    _requests: Bucket | None = field(init=False)
    _tokens: Bucket | None = field(init=False)

    def __post_init__(self) -> None:
        self._requests = None if self.limits.requests is None else Bucket(self.limits.requests)
        self._tokens = None if self.limits.tokens is None else Bucket(self.limits.tokens)

    def take_request(self, now: float) -> None:
        """Raises `ApiError` 429."""
        if (bucket := self._requests) is not None:
            _check(bucket, 1, "requests", now)
            bucket.take(1, now)

    def charge_tokens(self, amount: int, now: float) -> Charge | None:
        """What a request may use at most; to be settled, unless None. Raises `ApiError` 429."""
        if (bucket := self._tokens) is None:
            return None
        if amount > bucket.limit:
            raise too_many_tokens_asked(amount, bucket.limit)
        _check(bucket, amount, "tokens", now)
        return bucket.charge(amount, now)

    def settle_tokens(self, charge: Charge, used: int, now: float) -> None:
        assert self._tokens is not None, "it was charged"
        self._tokens.settle(charge, used, now)

    def headers(self, now: float) -> list[Header]:
        """Those that OpenAI answers with, for each limit that there is."""
        headers: list[Header] = []
        for kind, bucket in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if bucket is not None:
                headers += [
                    (b"x-ratelimit-limit-" + kind, b"%d" % bucket.limit),
                    (b"x-ratelimit-remaining-" + kind, b"%d" % bucket.remaining(now)),
                    (b"x-ratelimit-reset-" + kind, duration(bucket.refilled_in(now)).encode()),
                ]
        return headers


def _check(bucket: Bucket, amount: int, kind: Literal["requests", "tokens"], now: float) -> None:
    if wait := bucket.wait(amount, now):
        raise rate_limited(kind, bucket.limit, bucket.limit - bucket.remaining(now), amount, wait)


def duration(seconds: float) -> str:
    """As OpenAI writes it, which is Go's way: `17ms`, `1.25s`, `1m0s`. Rounded up to milliseconds."""
    millis = math.ceil(seconds * 1000)
    if millis < 1000:
        return f"{millis}ms" if millis else "0s"
    minutes, rest = divmod(millis, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
