"""What a worker does every `BEAT_INTERVAL`: it looks at what has a deadline, and tells the gateways that it lives."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kvferry.bus.liveness import BEAT_INTERVAL
from kvferry.errors import BusError
from kvferry.log import get_logger
from kvferry.rhythm import Rhythm
from kvferry.runtime import now
from kvferry.wire.beats import Heartbeat
from kvferry.wire.messages import Codecs
from kvferry.wire.subjects import beat_subject
from kvferry.worker.report import held, load, record

if TYPE_CHECKING:
    from kvferry.worker.worker import Worker

log = get_logger(__name__)


class Pulse:
    def __init__(self, worker: Worker[Any]) -> None:
        self._worker = worker
        settings = worker.settings
        self._subject = beat_subject(settings.cluster, worker.role, settings.name, worker.incarnation)
        self._codecs = Codecs()
        self._beaten = asyncio.Event()
        self._beat = 0
        self._rhythm = Rhythm(BEAT_INTERVAL)

    async def next_beat(self) -> None:
        """Returns when the next one is over."""
        self._beaten.clear()
        await self._beaten.wait()

    async def run(self) -> None:
        while True:
            await self._once(now())
            self._beaten.set()
            await self._rhythm.turn()

    def ride(self) -> None:
        """Something is being sent: a heartbeat that is nearly due goes with it, and wakes no gateway of its own."""
        self._rhythm.ride()

    async def _once(self, moment: float) -> None:
        worker = self._worker
        worker.inbox.tick(moment)
        worker.fences.expire(moment)
        worker.drop(*worker.scheduler.expire(moment))
        self._watch_step(worker.engine_loop.stuck_s(moment))
        worker.tick(moment)
        worker.outbox.repeat_ends(moment)
        worker.post.wake()
        await worker.cache_news.publish()
        await self._publish()

    def _watch_step(self, seconds: float) -> None:
        """The step that runs has taken so long."""
        if seconds > self._worker.settings.step_timeout:
            if self._worker.state != "wedged":
                log.error("wedged: no engine step ended", seconds=round(seconds, 1))
            self._worker.wedge()

    async def _publish(self) -> None:
        self._beat = (self._beat + 1) & 0xFFFFFFFF
        worker = self._worker
        beat = Heartbeat(self._beat, worker.state, record(worker), load(worker), held(worker))
        try:
            await worker.bus.publish(self._subject, self._codecs.beat.encode(beat))
        except BusError:
            return  # the next one is 250 ms away
