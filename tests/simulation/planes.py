"""Bus and data plane of the simulation: the in-memory ones, with a record of all that arrives and random bad frames."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from processes import acting_as, owned, process_name
from virtual_loop import EventLog

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import Deliver, Faults, MemoryBroker, MemoryBus
from kvferry.runtime import Runtime
from kvferry.transport.memory import MemoryLink, MemoryNetwork, MemoryTransport

FRAME_FAULTS: tuple[Callable[[bytearray, float], None], ...] = (
    lambda frame, where: frame.__setitem__(int(where * len(frame)), frame[int(where * len(frame))] ^ 0x10),
    lambda frame, where: frame.__delitem__(slice(int(where * len(frame)), None)),  # short
    lambda frame, where: frame.extend(bytes(1 + int(where * 64))),  # long
)


def fingerprint(payload: bytes | memoryview) -> str:
    return hashlib.blake2b(payload, digest_size=6).hexdigest()


class SimulatedBroker(MemoryBroker):
    """Messages in flight belong to no process; their arrival is an event of the subscriber."""

    def __init__(self, runtime: Runtime, log: EventLog) -> None:
        super().__init__(runtime)
        self.deaf: dict[str, None] = {}  # processes whose queue at the server is full
        self._log = log

    def attach(self, pattern: str, deliver: Deliver) -> object:
        owner = process_name.get()

        def recorded(subject: str, payload: bytes, reply: str, no_responders: bool) -> None:
            if owner in self.deaf:
                self.counters.lost += 1
                return
            self._log.record("bus", owner, subject, fingerprint(payload), no_responders)
            with acting_as(owner):
                deliver(subject, payload, reply, no_responders)

        return super().attach(pattern, recorded)

    def _schedule(self) -> None:
        with acting_as(None):
            super()._schedule()


class SimulatedBus(MemoryBus):
    """A process's connection to the broker; it stays that process's when it is made again."""

    def __init__(self, broker: MemoryBroker, settings: BusSettings, runtime: Runtime) -> None:
        super().__init__(broker, settings, runtime)
        self._owner = process_name.get()

    def _connect(self) -> bool:
        with acting_as(self._owner):
            return super()._connect()


@dataclass
class FrameFaults:
    """What befalls KV frames: the probability that one arrives changed, cut short or with bytes too many."""

    corruption: float = 0.0
    applied: int = 0


class SimulatedNetwork(MemoryNetwork):
    """What arrives at an end of a connection is an event of the process on that end."""

    def __init__(self, runtime: Runtime, log: EventLog) -> None:
        super().__init__()
        self.faults = FrameFaults()
        self._runtime = runtime
        self._log = log

    def attach(self, name: str, transport: MemoryTransport) -> None:
        super().attach(name, transport)
        transport.admit = owned(name, transport.admit)  # type: ignore[method-assign]

    def add(self, link: MemoryLink) -> None:
        super().add(link)
        arrived = link.arrived

        def recorded(message: memoryview) -> None:
            self._log.record("flow", link.there, link.here, fingerprint(message))
            arrived(message)

        link.arrived = owned(link.here, recorded)  # type: ignore[method-assign]
        link.break_off = owned(link.here, link.break_off)  # type: ignore[method-assign]

    def spoil(self, frame: memoryview) -> bytes | memoryview:
        arriving = super().spoil(frame)
        if self.faults.corruption and self._runtime.uniform() < self.faults.corruption:
            changed = bytearray(arriving)
            fault = FRAME_FAULTS[int(self._runtime.uniform() * len(FRAME_FAULTS))]
            fault(changed, self._runtime.uniform())
            self.faults.applied += 1
            arriving = bytes(changed)
        self._log.record("frame", fingerprint(arriving))
        return arriving


NOISE = Faults(loss=0.03, duplication=0.05, reordering=0.05, min_delay=0.0002, max_delay=0.01)
