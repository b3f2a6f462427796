"""The admission queue: oldest first, with bounded overtaking (`docs/protocol.md`, memory rules 4 and 5)."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator

from kvferry.schedule.sequence import Key, Sequence


def to_displace(queued: Iterable[Sequence], urgent: Sequence) -> Sequence | None:
    """Who gives up its place in a full queue to `urgent`: the last of a lower priority. Age displaces nobody."""
    lower = [sequence for sequence in queued if sequence.work.priority > urgent.work.priority]
    return max(lower, key=lambda sequence: sequence.order, default=None)


class AdmissionQueue:
    """Sequences that wait for memory, ordered by (priority, arrival, ticket)."""

    def __init__(self, overtake_s: float) -> None:
        self._overtake_s = overtake_s
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(tuple(self._sequences))

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._sequences, sequence, key=lambda item: item.order)

    def remove(self, key: Key) -> Sequence | None:
        for position, sequence in enumerate(self._sequences):
            if sequence.key == key:
                return self._sequences.pop(position)
        return None

    def admit(self, now: float, admit: Callable[[Sequence], bool], reclaim: Callable[[Sequence], bool]) -> int:
        """Offer memory in order; `admit` takes it or returns False and changes nothing.

        For the oldest that does not fit, `reclaim` may take memory back from younger ones (True: try again).
        Younger sequences pass a blocked one only for the overtake window, counted from when it was first blocked.
        """
        admitted = 0
        blocked_since: float | None = None
        for sequence in self:
            if blocked_since is not None and now - blocked_since >= self._overtake_s:
                break
            if admit(sequence) or (blocked_since is None and reclaim(sequence) and admit(sequence)):
                sequence.blocked_since = None
                self._sequences.remove(sequence)
                admitted += 1
                continue
            if sequence.blocked_since is None:
                sequence.blocked_since = now
            if blocked_since is None:
                blocked_since = sequence.blocked_since
        return admitted
