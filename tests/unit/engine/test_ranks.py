"""What ranks tell each other: steps as columns, channels that end or say too much, loads that fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.engine.columns import MAX_STEP_ROWS, Columns, ColumnsMessage, Wanted
from kvferry.engine.ranks import channel
from kvferry.engine.ranks.channel import SocketChannel
from kvferry.engine.ranks.followers import Failed, Followers, Head, Setup, Step
from kvferry.engine.ranks.following import DirectChannel, Follower, Load, follow
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.errors import CheckpointError, MalformedMessage, RankLost, SettingError
from kvferry.schedule.step import SequenceStep

ONE = SequenceStep(0, np.asarray([5, 6], np.uint32), 3, np.asarray([1], np.int32))
Pair = tuple[SocketChannel, SocketChannel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    own, theirs = map(SocketChannel, socket.socketpair())
    yield own, theirs
    own.close()
    theirs.close()


@st.composite
def steps(draw: st.DrawFn) -> list[SequenceStep]:
    def column(dtype: type[np.generic], most: int) -> np.ndarray:
        return np.asarray(draw(st.lists(st.integers(0, most), min_size=1, max_size=9)), dtype)

    count = draw(st.integers(1, 5))
    return [
        SequenceStep(index, column(np.uint32, 2**32 - 1), draw(st.integers(0, 2**20)), column(np.int32, 2**31 - 1))
        for index in range(count)
    ]


@given(steps(), st.data())
def test_a_step_is_the_same_behind_the_channel(sequences: list[SequenceStep], data: st.DataObject) -> None:
    wanted = [data.draw(st.sampled_from(Wanted)) for _ in sequences]
    content = msgspec.msgpack.encode(Step(Columns.of(sequences, wanted).message(), head=True))
    columns = Columns.read(msgspec.msgpack.decode(content, type=Step).columns)
    assert columns.wanted.tolist() == wanted
    for found, sent in zip(columns.steps(), sequences, strict=True):
        assert found.start == sent.start
        assert np.array_equal(found.tokens, sent.tokens)
        assert np.array_equal(found.block_table, sent.block_table)


@pytest.mark.parametrize(
    "wrong",
    [
        SequenceStep(0, np.asarray([5], np.int64), 0, np.zeros(1, np.int32)),
        SequenceStep(0, np.asarray([5], np.uint32), 0, np.zeros(1, np.int64)),
        SequenceStep(0, np.zeros(MAX_STEP_ROWS + 1, np.uint32), 0, np.zeros(1, np.int32)),
    ],
    ids=["tokens", "blocks", "rows"],
)
def test_a_step_that_no_engine_takes_is_refused_before_anybody_hears_of_it(wrong: SequenceStep) -> None:
    with pytest.raises(RuntimeError):
        Columns.of([wrong], [Wanted.NONE])


@pytest.mark.parametrize("field", ["per_sequence", "tokens", "tables"])
@pytest.mark.parametrize("change", [b"", b"\0\0\0\0", b"\0"], ids=["cut", "more", "odd"])
def test_columns_that_do_not_fit_together_are_malformed(field: str, change: bytes) -> None:
    good = Columns.of([ONE], [Wanted.LAST]).message()
    content = getattr(good, field)
    bad: ColumnsMessage = msgspec.structs.replace(good, **{field: content + change if change else content[:-4]})
    with pytest.raises(MalformedMessage):
        Columns.read(bad)


def test_a_channel_ends_with_its_other_end_and_bounds_what_it_takes() -> None:
    own, far = socket.socketpair()
    theirs = SocketChannel(far)
    SocketChannel(own).send(b"whole")
    own.sendall((9).to_bytes(4, "little") + b"cut")
    own.close()
    assert theirs.receive() == b"whole"
    assert theirs.receive() is None
    with pytest.raises(OSError, match="Broken pipe"):
        theirs.send(b"nobody hears")
    theirs.close()


def test_a_message_beyond_the_limit_is_neither_sent_nor_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair[0].send(b"four")
    with pytest.raises(MalformedMessage, match="limit 3"):
        pair[1].receive(3)
    monkeypatch.setattr(channel, "MAX_CHANNEL_BYTES", 3)
    with pytest.raises(RuntimeError, match="4 bytes"):
        pair[0].send(b"four")


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (SettingError("isa", "there is none"), SettingError("isa", "there is none")),
        (CheckpointError("a.safetensors", "cut"), CheckpointError("a.safetensors", "cut")),
        (MemoryError("no room"), RankLost(1, "MemoryError: no room")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_load_is_the_leaders_error(pair: Pair, error: Exception, seen: Exception) -> None:
    followers = Followers(SharedMemory.create(2), [pair[0]])
    pair[1].send(msgspec.msgpack.encode(Failed.of(error)))
    with pytest.raises(type(seen)) as raised:
        followers.ready()
    assert str(raised.value) == str(seen)
    followers.memory.close()


class Obedient:
    """Notes what it is told."""

    weight_bytes = 7

    def __init__(self) -> None:
        self.told: list[object] = []

    def step(self, columns: Columns, *, head: bool) -> None:
        self.told.append((columns.tokens.tolist(), head))

    def head(self, rows: range) -> None:
        self.told.append(rows)

    def close(self) -> None:
        self.told.append("end")


def loading(obedient: Obedient) -> Load:
    def load(setup: Setup) -> Follower:
        assert (setup.engine, setup.rank, setup.settings) == ("torch", 1, {"threads": 2})
        return obedient

    return load


Led = tuple[Followers, Obedient, Callable[[], None]]


@pytest.fixture(params=["thread", "direct"])
def led(request: pytest.FixtureRequest, pair: Pair) -> Iterator[Led]:
    """A leader, its follower, and what waits until that has done all it was told."""
    obedient = Obedient()
    thread = threading.Thread(target=follow, args=(pair[1], loading(obedient)))
    if request.param == "thread":
        thread.start()
    end = pair[0] if request.param == "thread" else DirectChannel(loading(obedient))
    followers = Followers(SharedMemory.create(2), [end])
    followers.set_up("torch", {"threads": 2})
    assert followers.ready() == [7]

    def ended() -> None:
        if request.param == "thread":
            thread.join(30)
            assert not thread.is_alive()

    yield followers, obedient, ended
    followers.close()
    ended()
    followers.memory.close()


def test_a_follower_does_what_it_is_told_in_that_order_and_ends_with_its_leader(led: Led) -> None:
    followers, obedient, ended = led
    with followers.told(Step(Columns.of([ONE], [Wanted.NONE]).message(), head=False)):
        pass
    with followers.told(Head(2, 5)):
        pass
    followers.close()
    ended()
    assert obedient.told == [([5, 6], False), range(2, 5), "end"]


def test_ranks_are_out_of_step_for_good_when_the_leader_fails(led: Led) -> None:
    followers, _, ended = led
    with pytest.raises(MemoryError), followers.told(Head(0, 1)):
        raise MemoryError
    ended()  # it heard the end
    with pytest.raises(RankLost, match="rank 1"), followers.told(Head(0, 1)):
        pass


def test_a_leader_hears_why_a_follower_could_not_load(pair: Pair) -> None:
    def load(setup: Setup) -> Follower:
        raise SettingError("isa", f"rank {setup.rank} has none")

    failures: list[BaseException] = []

    def run() -> None:
        try:
            follow(pair[1], load)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    followers = Followers(SharedMemory.create(2), [pair[0]])
    followers.set_up("native", {})
    with pytest.raises(SettingError, match="rank 1 has none"):
        followers.ready()
    thread.join(30)
    assert [type(failure) for failure in failures] == [SettingError], "its process ends"
    followers.memory.close()
