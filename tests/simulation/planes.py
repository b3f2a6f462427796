"""Bus and data plane of the simulation: the in-memory ones, with a record of all that arrives and more to go wrong.

Messages and frames on their way belong to no process; their arrival is an event of the process that they reach.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lanes import ProcessRuntime
from processes import acting_as, owned, process_name
from virtual_loop import EventLog

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import Deliver, Faults, MemoryBroker, MemoryBus
from kvferry.runtime import Runtime
from kvferry.transport.memory import MemoryLink, MemoryNetwork, MemoryTransport
from kvferry.wire.flow import FlowCodec, Open

MAX_REMEMBERED_FRAMES = 8
NOISE = Faults(loss=0.03, duplication=0.05, reordering=0.05, min_delay=0.0002, max_delay=0.01)
STORM = Faults(loss=0.25, duplication=0.2, reordering=0.3, min_delay=0.0002, max_delay=0.08, hold=0.3)


def fingerprint(payload: bytes | memoryview) -> str:
    return hashlib.blake2b(payload, digest_size=6).hexdigest()


class SimulatedBroker(MemoryBroker):
    """The server, and the way of each process to it and from it."""

    def __init__(self, runtime: Runtime, log: EventLog) -> None:
        super().__init__(runtime)
        self.deaf: dict[str, None] = {}  # processes that nothing reaches
        self.mute: dict[str, None] = {}  # processes that reach nobody
        self.beatless: dict[str, None] = {}  # processes whose heartbeats get lost
        self.tokenless: dict[str, None] = {}  # workers whose tokens get lost
        self.on_fence: Callable[[str | None, bytes], None] | None = None  # is told once the process has taken it
        self._log = log

    def send(self, publisher: int, subject: str, payload: bytes, reply: str) -> None:
        sender = process_name.get()
        lost = sender in self.mute or (sender in self.beatless and ".beat." in subject)
        if lost or (sender in self.tokenless and ".gateway." in subject):
            self.counters.lost += 1
            return
        with acting_as(None):
            super().send(publisher, subject, payload, reply)

    def attach(self, pattern: str, deliver: Deliver) -> object:
        owner = process_name.get()

        def recorded(subject: str, payload: bytes, reply: str, no_responders: bool) -> None:
            if owner in self.deaf:
                self.counters.lost += 1
                return
            self._log.record("bus", owner, subject, fingerprint(payload), no_responders)
            with acting_as(owner):
                deliver(subject, payload, reply, no_responders)
                if payload[3:8] == b"fence" and self.on_fence is not None:
                    asyncio.get_running_loop().call_soon(self.on_fence, owner, payload)

        return super().attach(pattern, recorded)

    def _schedule(self) -> None:
        with acting_as(None):
            super()._schedule()


class SimulatedBus(MemoryBus):
    """A process's connection to the broker; it stays that process's when it is made again."""

    def __init__(self, broker: MemoryBroker, settings: BusSettings, runtime: Runtime) -> None:
        super().__init__(broker, settings, runtime)
        self._owner = process_name.get()

    def severed(self) -> None:
        with acting_as(self._owner):
            super().severed()

    def _connect(self) -> bool:
        with acting_as(self._owner):
            return super()._connect()


# What befalls a frame: (frame, where in it from 0 to 1, frames that came before it) -> as it arrives.
FrameFault = Callable[[bytearray, float, "deque[bytes]"], bytearray]


def _flipped(frame: bytearray, where: float, before: deque[bytes]) -> bytearray:
    frame[int(where * len(frame))] ^= 0x10
    return frame


def _short(frame: bytearray, where: float, before: deque[bytes]) -> bytearray:
    return frame[: int(where * len(frame))]


def _long(frame: bytearray, where: float, before: deque[bytes]) -> bytearray:
    return frame + bytes(1 + int(where * 64))


def _stale(frame: bytearray, where: float, before: deque[bytes]) -> bytearray:
    """A whole, sealed frame of before, perhaps of another pull, in the place of this one."""
    return bytearray(before[int(where * len(before))]) if before else _flipped(frame, where, before)


FRAME_FAULTS: tuple[FrameFault, ...] = (_flipped, _short, _long, _stale)


@dataclass
class FrameFaults:
    """What befalls KV frames: a share of all arrives wrong, or the next few."""

    corruption: float = 0.0  # probability of a frame to arrive wrong
    next_wrong: int = 0  # so many arrive wrong next
    applied: int = 0
    before: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED_FRAMES))


class SimulatedNetwork(MemoryNetwork):
    """Connections between processes. What is held back by a partition arrives when that ends, as over TCP."""

    def __init__(self, runtime: ProcessRuntime, log: EventLog) -> None:
        super().__init__()
        self.faults = FrameFaults()
        self.max_delay = 0.0
        self.delay = lambda: self.max_delay * runtime.uniform() if self.max_delay else 0.0
        # Changes an Open on its way to a process: (the process, the message) -> what it becomes.
        self.mix_up: Callable[[str, Open], Open] | None = None
        self.links: dict[MemoryLink, None] = {}
        self._blocked: dict[tuple[str, str], None] = {}
        self._runtime = runtime
        self._log = log
        self._flow = FlowCodec()

    def attach(self, name: str, transport: MemoryTransport) -> None:
        super().attach(name, transport)
        transport.admit = owned(name, transport.admit)  # type: ignore[method-assign]

    def block(self, here: str, there: str) -> None:
        """From here on nothing gets from one process to the other, and nobody is told."""
        self._blocked[here, there] = None

    def unblock(self, here: str, there: str) -> None:
        self._blocked.pop((here, there), None)
        for link in list(self.links):
            if (link.here, link.there) == (here, there):
                link.schedule()

    def is_frozen(self, *names: str) -> bool:
        return super().is_frozen(*names) or names in self._blocked

    def add(self, link: MemoryLink) -> None:
        super().add(link)
        self.links[link] = None
        arrived, take_frame, schedule = link.arrived, link._take_frame, link.schedule

        def recorded(message: memoryview) -> None:
            if self.mix_up is not None:
                message = self._mixed_up(link.here, message)
            self._log.record("flow", link.there, link.here, fingerprint(message))
            arrived(message)

        def spoiled(tag: int, frame: bytes | memoryview) -> None:
            arriving = self._spoiled(frame)
            self._log.record("frame", link.there, link.here, tag, fingerprint(arriving))
            take_frame(tag, arriving)

        def on_its_way() -> None:
            with acting_as(None):
                schedule()

        link.arrived = owned(link.here, recorded)  # type: ignore[method-assign]
        link.break_off = owned(link.here, link.break_off)  # type: ignore[method-assign]
        link._take_frame = owned(link.here, spoiled)  # type: ignore[method-assign]
        link.schedule = on_its_way  # type: ignore[method-assign]

    def remove(self, link: MemoryLink) -> None:
        super().remove(link)
        self.links.pop(link, None)

    def _spoiled(self, frame: bytes | memoryview) -> bytes | memoryview:
        faults, uniform = self.faults, self._runtime.uniform
        if not faults.corruption and not faults.next_wrong:
            return frame
        whole = bytes(frame)
        if faults.next_wrong:
            faults.next_wrong -= 1
        elif uniform() >= faults.corruption:
            faults.before.append(whole)
            return frame
        befall = FRAME_FAULTS[int(uniform() * len(FRAME_FAULTS))]
        arriving = bytes(befall(bytearray(whole), uniform(), faults.before))
        faults.before.append(whole)
        faults.applied += arriving != whole
        return arriving

    def _mixed_up(self, here: str, message: memoryview) -> memoryview:
        flow = self._flow.decode(message)
        if not isinstance(flow, Open) or self.mix_up is None:
            return message
        return memoryview(self._flow.encode(self.mix_up(here, flow)))
