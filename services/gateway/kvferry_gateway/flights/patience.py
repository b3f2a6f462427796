"""How long a request waits for a place before it is refused. Pure.

Workers that were ready a moment ago are likely to be back in a moment: they restart, or the bus did. For them a new
request waits, so that nobody notices a rolling restart. For workers that never were, or have been away for long, it
does not: its client is better off at once with another gateway.
"""

from __future__ import annotations

from typing import Final

from kvferry_gateway.errors import ApiError

NEW_REQUEST_WAIT: Final = 5.0  # seconds
RECENT_ABSENCE: Final = 10.0  # seconds without a ready worker; after an outage of the bus they count anew


def new_request_wait(error: ApiError, *, may_return: bool, absent_s: float) -> float:
    """Seconds from its arrival, of a request that nobody has accepted and that met `error`.

    `may_return`: who could have taken it was away, not unwilling. `absent_s`: seconds at its arrival since a worker of
    its model was last known to be ready.
    """
    is_absence = error.status == 503 and error.code != "worker_failed"
    return NEW_REQUEST_WAIT if is_absence and may_return and absent_s <= RECENT_ABSENCE else 0.0


def begun_request_wait(error: ApiError, replace_wait: float) -> float:
    """Seconds since it lost its workers, of a request that was accepted before: for whatever will pass."""
    return replace_wait if error.status in (429, 503) and error.code != "worker_failed" else 0.0
