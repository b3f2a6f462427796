"""The shards of a worker, as its leader sees them: its own, and those on other hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from kvferry.errors import RankLost
from kvferry.transport.slots import SlotState
from kvferry.worker.handoff.channel import ShardChannel
from kvferry.worker.handoff.fetching import PartFetcher
from kvferry.worker.handoff.orders import (
    Asked,
    Begin,
    Computed,
    CountSlots,
    Finish,
    Land,
    Landed,
    Listening,
    Lost,
    Progressed,
    Serve,
    Served,
    Settle,
    Settled,
    Slots,
    Stop,
    Word,
)
from kvferry.worker.handoff.serving import PartServer

BEGIN_TIMEOUT_S: Final = 20.0  # for a shard to open its data plane
COUNT_TIMEOUT_S: Final = 1.0  # for one to say what its slots are in

ServeOrder = Serve | Computed | Finish | Stop
LandOrder = Land | Settle
ServeWord = Asked | Served
LandWord = Landed | Lost | Progressed | Settled


class Shard(Protocol):
    """Where orders about parts go, and words about them come from."""

    heads: range

    @property
    def is_remote(self) -> bool: ...

    def tell(self, order: ServeOrder | LandOrder) -> None: ...

    def on_word(self, handler: Callable[[ServeWord | LandWord], None]) -> None:
        """Set who hears its words."""


class OwnShard:
    """The leader's own. Implements `Shard`: all is done, and heard, at once."""

    is_remote: Final = False

    def __init__(self, heads: range) -> None:
        self.heads = heads
        self.server: PartServer | None = None
        self.fetcher: PartFetcher | None = None
        self._handler: Callable[[ServeWord | LandWord], None] = lambda word: None

    def tell(self, order: ServeOrder | LandOrder) -> None:
        if isinstance(order, Land | Settle):
            assert self.fetcher is not None
            self.fetcher.hear(order)
        else:
            assert self.server is not None
            self.server.hear(order)

    def on_word(self, handler: Callable[[ServeWord | LandWord], None]) -> None:
        self._handler = handler

    def said(self, word: ServeWord | LandWord) -> None:
        self._handler(word)


class RemoteShard:
    """On another host. Implements `Shard`."""

    is_remote: Final = True

    def __init__(self, rank: int, channel: ShardChannel) -> None:
        self.rank = rank
        self.heads = range(0)  # until it has begun
        self.address = ""
        self._channel = channel
        self._handler: Callable[[ServeWord | LandWord], None] = lambda word: None
        self._counting: list[asyncio.Future[dict[SlotState, int]]] = []  # who waits for Slots
        self._words: Final = msgspec.msgpack.Decoder(Word)

    async def begin(self, order: Begin) -> None:
        """Let it open its data plane. Raises `RankLost`."""
        self._channel.send(msgspec.msgpack.encode(order))
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT_S):
                payload = await self._channel.receive()
        except TimeoutError:
            payload = None
        word = None if payload is None else self._words.decode(payload)
        if not isinstance(word, Listening):
            raise RankLost(self.rank, "its data plane did not come up")
        self.address, self.heads = word.address, range(*word.heads)

    async def run(self) -> None:
        """Hear it until it is gone."""
        while (payload := await self._channel.receive()) is not None:
            word = self._words.decode(payload)
            if isinstance(word, Slots):
                waiting, self._counting = self._counting, []
                for each in waiting:
                    each.set_result(word.counts)
            elif not isinstance(word, Listening):
                self._handler(word)

    async def slot_counts(self) -> dict[SlotState, int] | None:
        """Of its staging slots, by state; None if it doesn't say."""
        told: asyncio.Future[dict[SlotState, int]] = asyncio.get_running_loop().create_future()
        self._counting.append(told)
        self._channel.send(msgspec.msgpack.encode(CountSlots()))
        await asyncio.wait([told], timeout=COUNT_TIMEOUT_S)
        if told.done():
            return told.result()
        self._counting.remove(told)
        return None

    def tell(self, order: ServeOrder | LandOrder) -> None:
        self._channel.send(msgspec.msgpack.encode(order))

    def on_word(self, handler: Callable[[ServeWord | LandWord], None]) -> None:
        self._handler = handler

    def close(self) -> None:
        self._channel.close()
