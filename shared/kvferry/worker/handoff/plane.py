"""The data plane of a shard on another host than its leader: it moves frames between its KV and the shards of other
workers, as its leader says. It decides nothing, and ends with its leader's channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from kvferry.log import get_logger
from kvferry.runtime import Runtime, TaskSet, now
from kvferry.schedule.step import KVStore
from kvferry.transport.base import Connection, Transport
from kvferry.transport.pool import ConnectionPool
from kvferry.transport.slots import SlotPool
from kvferry.wire.flow import Abort, Ack, Credit, FetchPart, FlowCodec
from kvferry.worker.handoff.channel import ShardChannel
from kvferry.worker.handoff.fetching import PartFetcher
from kvferry.worker.handoff.hearing import Hearing
from kvferry.worker.handoff.landing import Dock
from kvferry.worker.handoff.orders import Begin, CountSlots, Land, Listening, Order, Settle, Slots, Word
from kvferry.worker.handoff.pace import Pace
from kvferry.worker.handoff.serving import PartLink, PartServer
from kvferry.worker.handoff.timing import TransferRate
from kvferry.worker.metrics import WorkerMetrics

log = get_logger(__name__)
TICK_S: Final = 0.25
_ORDERS: Final = msgspec.msgpack.Decoder(Order)
OpenTransport: TypeAlias = Callable[[Begin], Transport]


class ShardPlane:
    """Made when the leader has said what it should be like."""

    def __init__(
        self,
        begin: Begin,
        store: KVStore,
        transport: Transport,
        channel: ShardChannel,
        runtime: Runtime,
    ) -> None:
        self.transport = transport
        self.slots = SlotPool(begin.num_slots, begin.slot_bytes)
        self.metrics = WorkerMetrics()  # nobody reads these: the leader counts what it is told
        self.tasks = TaskSet(self._task_failed)
        self._channel = channel
        self._copy_lane = runtime.lane("copy")
        self._hearing = Hearing(self.metrics)
        self._links: dict[PartLink, None] = {}
        self.server = PartServer(store, self.slots, self._copy_lane, self.tasks, self.metrics, self._tell)
        # It holds nothing back: which step of the ranks a frame disturbs is not known here.
        pace = Pace(1.0, self.slots.slot_bytes, TransferRate())
        dock = Dock(store, self.slots, self._copy_lane, self.metrics, FlowCodec(), pace)
        self._connections = ConnectionPool(transport)
        self.fetcher = PartFetcher(self._connections, dock, self.tasks, self._tell)
        self._serves = begin.serves
        self.heads = store.heads

    async def run(self) -> None:
        """Until the leader is gone. Raises `TransportUnavailable`."""
        await self.transport.start(self._attach if self._serves else Connection.abort)
        self._tell(Listening(self.transport.address, (self.heads.start, self.heads.stop)))
        ticking = self.tasks.spawn(self._tick(), "tick")
        try:
            while (payload := await self._channel.receive()) is not None:
                self._hear(_ORDERS.decode(payload))
        finally:
            ticking.cancel()
        await self._close()

    async def _close(self) -> None:
        self._channel.close()
        await self._connections.close()
        await self.transport.close()
        await self._copy_lane.drain()
        await self.tasks.cancel()
        self._copy_lane.close()

    def _hear(self, order: Order) -> None:
        if isinstance(order, Begin):
            raise RuntimeError("the leader begins twice")
        if isinstance(order, CountSlots):
            self._tell(Slots(self.slots.counts()))
        elif isinstance(order, Land | Settle):
            self.fetcher.hear(order)
        else:
            self.server.hear(order)

    def _tell(self, word: Word) -> None:
        self._channel.send(msgspec.msgpack.encode(word))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.fetcher.tick(now())
            for link in list(self._links):
                if link.is_stalled(now()):
                    link.connection.abort()

    # -- connections of D's shards ---------------------------------------------------------------------------

    def _attach(self, connection: Connection) -> None:
        link = PartLink(connection)
        self._links[link] = None
        connection.on_message(lambda message: self._on_message(link, message))
        connection.on_closed(lambda: self._on_closed(link))

    def _on_message(self, link: PartLink, payload: memoryview) -> None:
        message = self._hearing.understand(link.connection, payload)
        if isinstance(message, FetchPart | Credit | Abort | Ack):
            self.server.take(link, message)
        elif message is not None:
            self._hearing.distrust(link.connection, "unexpected")

    def _on_closed(self, link: PartLink) -> None:
        self._links.pop(link, None)
        self.server.closed(link)

    def _task_failed(self, name: str, error: BaseException) -> None:
        log.error("task failed", task=name, exc_info=error)


async def open_plane(
    channel: ShardChannel, store: KVStore, open_transport: OpenTransport, runtime: Runtime
) -> ShardPlane | None:
    """Wait for the leader to say what the data plane should be like; None if it ends before."""
    payload = await channel.receive()
    if payload is None:
        channel.close()
        return None
    begin = _ORDERS.decode(payload)
    if not isinstance(begin, Begin):
        raise RuntimeError("the leader does not begin")
    return ShardPlane(begin, store, open_transport(begin), channel, runtime)
