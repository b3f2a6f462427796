"""Who may join a worker as a rank on another host: only who holds the data key and runs the same version."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest

from kvferry.engine.ranks.channel import SocketChannel
from kvferry.errors import HandshakeRefused, RankLost, SettingError
from kvferry.runtime import SeededRuntime
from kvferry.transport.hello import Handshake
from kvferry.worker import rank_port
from kvferry.worker.rank_port import Join, RankLink, RankPort, greet, join_leader

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
RUNTIME = SeededRuntime(0)
SEEDS = itertools.count(1)  # of ranks: each draws a session of its own


@pytest.fixture
def port() -> Iterator[RankPort]:
    port = RankPort("127.0.0.1", 0, KEY, RUNTIME)
    yield port
    port.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def number(port: RankPort) -> int:
    return int(port.address.rpartition(":")[2])


def joining(pool: ThreadPoolExecutor, port: RankPort, key: bytes = KEY) -> Future[RankLink]:
    return pool.submit(join_leader, "127.0.0.1", number(port), key, SeededRuntime(next(SEEDS)))


def stranger(port: RankPort) -> socket.socket:
    return socket.create_connection(("127.0.0.1", number(port)))


def test_two_ranks_join_each_with_three_channels_to_the_same_leader(pool: ThreadPoolExecutor, port: RankPort) -> None:
    ranks = [joining(pool, port) for _ in range(2)]
    leader = port.accept(2)
    ends = [rank.result(30) for rank in ranks]
    for name in (b"first", b"second"):
        leader[name == b"second"].steps.send(name + b" steps")
        leader[name == b"second"].copies.send(name + b" copies")
        leader[name == b"second"].handoffs.send(name + b" handoffs")
    heard = sorted([channel.receive() for channel in end.channels] for end in ends)
    assert heard == [[name + what for what in (b" steps", b" copies", b" handoffs")] for name in (b"first", b"second")]
    assert {link.host for link in (*leader, *ends)} == {"127.0.0.1"}
    for link in (*leader, *ends):
        link.close()


def test_a_rank_without_the_key_is_turned_away_and_the_right_one_is_waited_for(
    pool: ThreadPoolExecutor, port: RankPort
) -> None:
    accepting = pool.submit(port.accept, 1)
    with pytest.raises(HandshakeRefused, match="data key"):
        joining(pool, port, OTHER_KEY).result(30)
    assert not accepting.done()
    rank = joining(pool, port)
    (link,) = accepting.result(30)
    link.close()
    rank.result(30).close()


def test_silence_and_garbage_delay_a_rank_and_keep_it_out_never(
    pool: ThreadPoolExecutor, port: RankPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_port, "GREETING_S", 0.3)
    with stranger(port), stranger(port) as rude:
        rude.sendall(b"\xff" * 64)
        accepting, rank = pool.submit(port.accept, 1), joining(pool, port)
        (link,) = accepting.result(30)
        link.close()
        rank.result(30).close()


def test_a_rank_of_another_version_hears_why_it_is_refused(pool: ThreadPoolExecutor, port: RankPort) -> None:
    accepting = pool.submit(port.accept, 1)
    channel = SocketChannel(stranger(port))
    greet(channel, "initiator", KEY, SeededRuntime(1))
    channel.send(msgspec.msgpack.encode(Join("0.0.0", bytes(16), "steps")))
    answer = channel.receive()
    assert answer is not None
    assert "0.0.0" in msgspec.msgpack.decode(answer)["problem"]
    assert channel.receive() is None
    channel.close()
    port.close()
    with pytest.raises(RankLost, match="no longer waited for"):
        accepting.result(30)


def test_a_data_plane_proof_opens_no_rank_port() -> None:
    """The purpose is in the proof: what a worker says to another one can't be passed on."""
    worker = Handshake("initiator", KEY, 1, b"a" * 16)
    leader = Handshake("acceptor", KEY, 2, b"b" * 16, rank_port.PURPOSE)
    leader.feed(memoryview(worker.opening()))
    proof = worker.feed(memoryview(leader.opening()))
    assert proof is not None
    with pytest.raises(HandshakeRefused, match="data key"):
        leader.feed(memoryview(proof))


def test_a_port_that_cannot_be_had_names_its_setting(port: RankPort) -> None:
    with pytest.raises(SettingError, match="--rank-port"):
        RankPort("127.0.0.1", number(port), KEY, RUNTIME)
