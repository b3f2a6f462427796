"""What a leader and a shard on another host speak over, and a shard that does not come up."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import msgspec
import pytest

from kvferry.errors import RankLost
from kvferry.worker.handoff import channel as channels
from kvferry.worker.handoff import shards
from kvferry.worker.handoff.channel import DirectChannel, ShardChannel, StreamChannel
from kvferry.worker.handoff.orders import Begin, Listening, Served
from kvferry.worker.handoff.shards import RemoteShard

Pair = tuple[ShardChannel, ShardChannel]
BEGIN = Begin(serves=True, incarnation=1, transport="tcp", num_slots=4, slot_bytes=1 << 16)


@pytest.fixture(params=["stream", "direct"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    ends: Pair = DirectChannel.pair()
    if request.param == "stream":
        own, theirs = socket.socketpair()
        ends = (await StreamChannel.open(own), await StreamChannel.open(theirs))
    yield ends
    for end in ends:
        end.close()


async def test_messages_come_in_order_and_an_end_is_heard_behind_them(pair: Pair) -> None:
    for number in range(3):
        pair[0].send(bytes([number]) * (1 << 16))
    pair[1].send(b"answer")
    assert [(await pair[1].receive() or b"")[:1] for _ in range(3)] == [b"\0", b"\1", b"\2"]
    assert await pair[0].receive() == b"answer"
    pair[0].send(b"")
    pair[0].close()
    assert await pair[1].receive() == b""
    assert await pair[1].receive() is None


async def test_a_message_beyond_the_limit_ends_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    own, theirs = socket.socketpair()
    one, other = await StreamChannel.open(own), await StreamChannel.open(theirs)
    monkeypatch.setattr(channels, "MAX_MESSAGE_BYTES", 3)
    one.send(b"four")
    assert await other.receive() is None
    one.close()
    other.close()


async def test_a_shard_says_where_it_listens_and_its_words_are_heard_until_it_is_gone(pair: Pair) -> None:
    shard, heard = RemoteShard(1, pair[0]), []
    shard.on_word(heard.append)
    pair[1].send(msgspec.msgpack.encode(Listening("tcp://there", (1, 3))))
    await shard.begin(BEGIN)
    assert (shard.address, shard.heads) == ("tcp://there", range(1, 3))
    assert msgspec.msgpack.decode(await pair[1].receive() or b"", type=Begin) == BEGIN
    pair[1].send(msgspec.msgpack.encode(Served(7, 100)))
    pair[1].close()
    await shard.run()
    assert heard == [Served(7, 100)]


@pytest.mark.parametrize("says", [None, Served(1, 2)], ids=["nothing", "something else"])
async def test_a_shard_that_does_not_come_up_is_a_lost_rank(
    pair: Pair, says: Served | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BEGIN_TIMEOUT_S", 0.05)
    if says is not None:
        pair[1].send(msgspec.msgpack.encode(says))
    with pytest.raises(RankLost, match="rank 2: its data plane did not come up"):
        await RemoteShard(2, pair[0]).begin(BEGIN)
