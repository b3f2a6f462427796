"""What D keeps of each connection and of each pull on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvferry.schedule.sequence import Key, Sequence
from kvferry.transport.base import Connection
from kvferry.wire.record import WorkerAddress
from kvferry.worker.handoff.fetching import ABORT_TIMEOUT
from kvferry.worker.handoff.landing import Landing
from kvferry.worker.handoff.parts import Part
from kvferry_decode.others import Others


@dataclass(slots=True, eq=False)
class Pull:
    """One try to have a sequence's KV."""

    sequence: Sequence
    address: WorkerAddress
    parts: tuple[Part, ...]
    tries: int = 0  # with this one
    pull_id: int = 0
    link: Link | None = None
    holds_memory: bool = False  # P, as it says on this link
    landing: Landing | None = None  # from Fetch on: of the part between the leaders
    others: Others = field(default_factory=Others)  # the same, of the other parts
    began: float = 0.0
    computed_at: float | None = None  # when P said that nothing is left to compute
    heard: float = 0.0  # last sign of life of this pull, its frames apart
    aborting_since: float | None = None

    @property
    def key(self) -> Key:
        return self.sequence.key

    def has_stalled(self, moment: float, stall_s: float) -> bool:
        """Whether P has kept silent for too long: for `stall_s` seconds, or with the answer to an Abort."""
        if self.aborting_since is not None:
            return moment - self.aborting_since > ABORT_TIMEOUT
        if self.landing is None:
            return moment - self.heard > stall_s
        return not self.landing.waits_for_slot and moment - max(self.heard, self.landing.heard) > stall_s


@dataclass(slots=True, eq=False)
class Link:
    """One connection and the pulls on it; an aborted pull stays until its Aborted has come."""

    connection: Connection
    pulls: dict[int, Pull] = field(default_factory=dict)
