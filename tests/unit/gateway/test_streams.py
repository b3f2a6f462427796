"""Token batches into streams: order, duplicates, loss, fencing, text, backlog. No sockets, no bus."""

from __future__ import annotations

import asyncio
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_worker import EOS, tokens_of, write_model

from kvferry.errors import MalformedMessage
from kvferry.text.detokenizer import TokenTexts
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.beats import Held
from kvferry.wire.fields import pack_tokens
from kvferry.wire.logprobs import PromptLogprobs, pack_prompt_logprobs
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry.wire.tokens import End, EndReason, TokenBatch
from kvferry_gateway.answers.answer import COMMENT
from kvferry_gateway.answers.prompt_scores import PromptScores
from kvferry_gateway.http.connection import AsgiConnection, ClientConnection
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.placement.decision import Reason
from kvferry_gateway.placement.estimates import ForecastError
from kvferry_gateway.placement.forecast import Forecast
from kvferry_gateway.streams.attempt import Attempt, AttemptTable, Finished, Lost, audit
from kvferry_gateway.streams.dispatcher import Dispatcher, WorkerMail
from kvferry_gateway.streams.stream import SLOW_S, TokenStream

P, D = 11, 22  # incarnations
TEXT = "Grüße 😀!"
TOKENS = [*tokens_of(TEXT), EOS]


class Mail(WorkerMail):
    def __init__(self) -> None:
        self.acks: list[tuple[int, tuple[int, ...]]] = []
        self.scored: list[tuple[int, tuple[int, ...]]] = []
        self.resends: list[tuple[int, tuple[tuple[int, int], ...], str]] = []
        self.rescored: list[tuple[int, tuple[tuple[int, int], ...]]] = []

    def acknowledge(self, incarnation: int, stream_ids: tuple[int, ...], scored: tuple[int, ...]) -> None:
        if stream_ids:
            self.acks.append((incarnation, stream_ids))
        if scored:
            self.scored.append((incarnation, scored))

    def resend(
        self, incarnation: int, streams: tuple[tuple[int, int], ...], prompts: tuple[tuple[int, int], ...], cause: str
    ) -> None:
        self.resends.append((incarnation, streams, cause))
        if prompts:
            self.rescored.append((incarnation, prompts))


class Client(ClientConnection):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.aborted = False

    def pack(self, body: bytes) -> bytes:
        return body

    def put(self, packed: bytes) -> None:
        self.writes.append(packed)

    def abort(self) -> None:
        self.aborted = True

    async def close(self) -> None:
        self.unwatch()


def record(role: str, incarnation: int) -> WorkerRecord:
    return WorkerRecord(
        role, role, incarnation, 1, role, "m", "tcp", WorkerAddress(incarnation, ("a",)), "f", "n", 1000, 10, 100, 1
    )  # type: ignore[arg-type]


def forecast() -> Forecast:
    reason = Reason("least_work", 0.5, 0.0, 0.4, 0.1, 0.01, 1.0, 0, 1)
    return Forecast(reason, 0.0, ForecastError(0.5), ForecastError(0.2))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TokenTexts:
    return TokenTexts(Tokenizer(write_model(tmp_path_factory.mktemp("model") / "tiny")))


class Desk:
    """A dispatcher with one stream."""

    def __init__(self, texts: TokenTexts, *stops: str, limit: int = 1000) -> None:
        self.mail = Mail()
        self.table = AttemptTable()
        self.metrics = GatewayMetrics(["m"])
        self.dispatcher = Dispatcher(self.table, self.mail, self.metrics)
        self.stream = TokenStream(texts, stops, limit)
        self.seq = {P: 0, D: 0}
        self.numbers = 0
        self.attempt = self.begin()

    def begin(self) -> Attempt:
        self.numbers += 1
        self.attempt = Attempt(
            self.numbers, bytes(16), self.table.new_stream_id(), self.stream, record("decode", D),
            record("prefill", P), len(self.stream.tokens), asyncio.get_running_loop().create_future(), forecast(),
            accepted=True,
        )  # fmt: skip
        self.table.add(self.attempt)
        return self.attempt

    def say(
        self,
        *rows: tuple[int, int],
        end: tuple[EndReason, int] | None = None,
        sender: int = D,
        stream_id: int | None = None,
        seq: int | None = None,
        scored: tuple[int, int] | None = None,
    ) -> None:
        """`scored`: of the prompt, the tokens at these positions."""
        stream_id = self.attempt.stream_id if stream_id is None else stream_id
        seq = self.seq[sender] if seq is None else seq
        self.seq[sender] = seq + 1
        self.dispatcher.take(
            TokenBatch(
                sender, seq, pack_tokens([stream_id] * len(rows)), pack_tokens([i for i, _ in rows]),
                pack_tokens([t for _, t in rows]), () if end is None else (End(stream_id, end[1], end[0]),),
                prompts=() if scored is None else (pack_prompt_logprobs(stream_id, logprobs_of(*scored)),),
            )
        )  # fmt: skip

    @property
    def text(self) -> str:
        text: str = json.loads(b'"' + self.stream.take() + b'"')
        return text


def logprobs_of(start: int, end: int) -> PromptLogprobs:
    size = end - start
    return PromptLogprobs(start, np.ones(size, np.uint32), np.ones((size, 1), np.uint32), np.zeros((size, 2), "f4"))


async def turn() -> None:
    """The end of this turn of the loop."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@settings(max_examples=60)
@given(st.data())
def test_any_order_and_any_duplicates_give_the_text_once(texts: TokenTexts, data: st.DataObject) -> None:
    rows = list(enumerate(TOKENS))
    order = data.draw(st.permutations(rows + data.draw(st.lists(st.sampled_from(rows), max_size=10))))

    async def scenario() -> None:
        desk = Desk(texts)
        cuts = data.draw(st.lists(st.integers(0, len(order)), max_size=4).map(sorted))
        for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
            desk.say(*order[start:end], sender=data.draw(st.sampled_from([P, D])))
        desk.say(end=("stop", len(TOKENS)))
        await turn()
        assert desk.stream.tokens == TOKENS
        desk.stream.finish()
        assert desk.text == TEXT
        assert desk.attempt.over.result() == Finished("stop")

    asyncio.run(scenario())


async def test_a_missing_token_holds_back_what_follows(texts: TokenTexts) -> None:
    desk = Desk(texts)
    desk.say((0, TOKENS[0]), (2, TOKENS[2]), end=("stop", 3))
    await turn()
    assert desk.stream.tokens == TOKENS[:1]
    assert not desk.attempt.over.done(), "an end waits for its tokens"
    assert desk.mail.acks == [], "and is not confirmed before"
    desk.say((1, TOKENS[1]))
    await turn()
    assert desk.stream.tokens == TOKENS[:3]
    assert desk.attempt.over.result() == Finished("stop")


async def test_a_late_token_of_an_older_attempt_never_reaches_its_successor(texts: TokenTexts) -> None:
    desk = Desk(texts)
    old = desk.attempt
    desk.say((0, TOKENS[0]), (2, 9))
    desk.table.remove(old)
    desk.begin()
    desk.say((1, 9), (2, 9), stream_id=old.stream_id)
    assert desk.stream.tokens == TOKENS[:1]
    desk.say((1, TOKENS[1]))
    assert desk.stream.tokens == TOKENS[:2], "what the old attempt had sent ahead is gone, too"
    assert desk.metrics.value("kvferry_late_row_total") == 2


@pytest.mark.parametrize("held", [False, True])
async def test_two_tokens_for_one_index_end_the_attempt_before_the_next_row(texts: TokenTexts, held: bool) -> None:
    desk = Desk(texts)
    index = 3 if held else 0
    desk.say((index, 5))
    desk.say((index, 5))
    assert not desk.attempt.over.done(), "a duplicate is no mismatch"
    desk.say((index, 6), (1, 7), (2, 8))
    assert desk.attempt.over.result() == Lost("token_mismatch")
    assert desk.stream.tokens == ([] if held else [5])
    assert desk.metrics.value("kvferry_token_mismatch_total") == 1


async def test_nothing_beyond_the_limit_is_taken(texts: TokenTexts) -> None:
    desk = Desk(texts, limit=2)
    desk.say(*enumerate(TOKENS))
    desk.say((2, 1), (1 << 31, 1))
    assert desk.stream.tokens == TOKENS[:2]
    assert desk.stream.held == {}


# Characters that are escaped, or split between tokens, or neither.
LETTERS = 'ab"\\\n✈'


@given(text=st.text(LETTERS, max_size=30), stops=st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_the_first_stop_string_to_be_complete(
    texts: TokenTexts, text: str, stops: list[str]
) -> None:
    stream = TokenStream(texts, stops, 1000)
    for token in tokens_of(text):
        stream.append(token)
    stream.finish()
    ends = [(end, len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    end, length = min(ends, key=lambda found: (found[0], -found[1]), default=(len(text), 0))
    assert json.loads(b'"' + stream.take() + b'"') == text[: end - length]
    assert stream.stopped == bool(ends)


@pytest.mark.parametrize("stop", ["😀", "e 😀", "ß"])
@pytest.mark.parametrize("together", [False, True])
async def test_after_a_stop_string_no_token_is_taken(texts: TokenTexts, stop: str, together: bool) -> None:
    desk = Desk(texts, stop)
    if together:
        desk.say(*enumerate(TOKENS), end=("stop", len(TOKENS)))
    else:
        for row in enumerate(TOKENS):
            desk.say(row)
    await turn()
    assert desk.attempt.over.result() == Finished("stop")
    assert desk.text == TEXT[: TEXT.index(stop)]
    assert desk.stream.tokens == TOKENS[: len((TEXT[: TEXT.index(stop)] + stop).encode())]


async def test_gaps_in_batch_numbers_are_seen_and_late_batches_are_not_gaps(texts: TokenTexts) -> None:
    desk = Desk(texts)
    desk.say((0, TOKENS[0]))
    desk.say((2, TOKENS[2]), seq=2)
    assert desk.mail.resends == [(D, ((desk.attempt.stream_id, 1),), "gap")]
    desk.say((1, TOKENS[1]), seq=1)  # it was only overtaken
    desk.say((3, TOKENS[3]), seq=3)
    assert len(desk.mail.resends) == 1
    assert desk.stream.tokens == TOKENS[:4]
    desk.say((4, TOKENS[4]), seq=0)  # the worker had forgotten us and counts anew
    desk.say((5, TOKENS[5]), seq=1)
    assert len(desk.mail.resends) == 1
    desk.say((7, TOKENS[7]), seq=3)
    assert len(desk.mail.resends) == 2


async def test_batch_numbers_wrap_around(texts: TokenTexts) -> None:
    desk = Desk(texts)
    desk.say((0, TOKENS[0]), seq=(1 << 32) - 1)
    before = len(desk.mail.resends)
    desk.say((1, TOKENS[1]), seq=0)
    desk.say((2, TOKENS[2]), seq=1)
    assert len(desk.mail.resends) == before


async def test_ends_of_unknown_streams_are_confirmed_in_one_message_per_turn(texts: TokenTexts) -> None:
    desk = Desk(texts)
    for stream_id in (100, 101, 100):
        desk.say(end=("stop", 3), stream_id=stream_id)
    assert desk.mail.acks == []
    await turn()
    assert desk.mail.acks == [(D, (100, 101))]


async def test_an_end_of_prefill_counts_only_until_decode_runs(texts: TokenTexts) -> None:
    desk = Desk(texts)
    desk.say((0, TOKENS[0]), sender=P)
    desk.say((0, TOKENS[0]), sender=D)  # D's first batch repeats token 0
    desk.say(end=("expired", 1), sender=P)
    assert not desk.attempt.over.done()
    other = Desk(texts)
    other.say((0, TOKENS[0]), sender=P)
    other.say(end=("expired", 1), sender=P)
    assert other.attempt.over.result() == Lost("expired")
    assert not Lost("expired").is_failure
    assert Lost("transfer_failed").is_failure


@pytest.mark.parametrize("columns", [(4, 4, 8), (4, 0, 4), (3, 3, 3), (0, 4, 4)])
async def test_columns_of_unequal_length_are_refused_whole(texts: TokenTexts, columns: tuple[int, int, int]) -> None:
    desk = Desk(texts)
    with pytest.raises(MalformedMessage):
        desk.dispatcher.take(TokenBatch(D, 0, *(bytes(size) for size in columns)))
    assert desk.stream.tokens == []


async def test_each_touched_stream_is_written_once_per_turn_of_the_loop(texts: TokenTexts) -> None:
    desk = Desk(texts)
    client = Client()
    desk.stream.attach(client, 0.0, 1000, lambda: None)
    desk.say((0, TOKENS[0]), sender=P)
    desk.say((0, TOKENS[0]), (1, TOKENS[1]))
    desk.say((2, TOKENS[2]), (3, TOKENS[3]))
    assert client.writes == []
    await turn()
    assert client.writes == ["Grü".encode()]
    desk.say((4, TOKENS[4]), (5, TOKENS[5]))
    await turn()
    assert client.writes[1:] == ["ß".encode()]
    assert desk.metrics.value("kvferry_itl_seconds_count") == 1


async def test_a_slow_client_gets_everything_later_or_is_given_up_once(texts: TokenTexts) -> None:
    desk = Desk(texts)
    client = Client()
    slow: list[None] = []
    desk.stream.attach(client, 0.0, 5, lambda: slow.append(None))
    client.note_paused()
    desk.say(*list(enumerate(TOKENS))[:4])
    await turn()
    assert client.writes == []
    client.watch(lambda: None, lambda: desk.stream.resume(1.0))
    client.note_resumed()
    assert b"".join(client.writes) == "Grü".encode()
    client.note_paused()
    desk.say(*list(enumerate(TOKENS))[4:8])
    await turn()
    assert slow == []
    desk.say(*list(enumerate(TOKENS))[8:])
    await turn()
    desk.stream.put(b"more")
    desk.stream.flush(2.0)
    assert len(slow) == 1


async def test_a_client_is_not_slow_because_much_comes_at_once(texts: TokenTexts) -> None:
    stream, client = Desk(texts).stream, Client()
    slow: list[None] = []
    stream.attach(client, 5.0, 3, lambda: slow.append(None))
    client.note_paused()
    for moment in (5.0, 5.0 + SLOW_S / 2):
        stream.put(b"much")
        stream.flush(moment)
    assert slow == []
    stream.put(b"more")
    stream.flush(5.0 + SLOW_S)
    assert len(slow) == 1


async def test_a_client_is_not_slow_because_another_of_its_choices_has_just_filled_its_connection(
    texts: TokenTexts,
) -> None:
    """As after an outage of the bus, when all choices have much to write in one turn (simulation, seed 839)."""
    client = Client()
    first, second = Desk(texts).stream, Desk(texts).stream
    slow: list[None] = []
    for stream in (first, second):
        stream.attach(client, 5.0, 3, lambda: slow.append(None))
    late = 5.0 + 2 * SLOW_S
    first.put(b"much")
    first.flush(late)
    client.note_paused()
    second.put(b"much, too")
    second.flush(late)
    assert slow == []
    second.put(b"more")
    second.flush(late + SLOW_S)
    assert len(slow) == 1


async def test_a_silent_connection_gets_one_comment_however_many_choices_it_has(texts: TokenTexts) -> None:
    client = Client()
    streams = [Desk(texts).stream for _ in range(3)]
    for stream in streams:
        stream.attach(client, 5.0, 3, lambda: None)
    for stream in streams:
        stream.keep_alive(9.0, 4.0)
    assert client.writes == [COMMENT]


async def test_every_stream_of_a_batch_counts_in_the_time_between_tokens(texts: TokenTexts) -> None:
    desk = Desk(texts)
    streams = [desk.stream, TokenStream(texts, (), 1000), TokenStream(texts, (), 1000)]
    for stream in streams[1:]:
        desk.stream = stream
        desk.begin()
    ids = [stream.attempt.stream_id for stream in streams if stream.attempt is not None]
    gaps = [7.0, 7.0, 8.0]
    for index in range(2):
        columns = (ids, [index] * 3, [TOKENS[index]] * 3)
        desk.dispatcher.take(TokenBatch(D, index, *map(pack_tokens, columns)))
        await turn()
        for stream, gap in zip(streams, gaps, strict=True):
            stream.last_token_at -= gap
    assert desk.metrics.value("kvferry_itl_seconds_count", model="m") == 3
    assert 22.0 <= desk.metrics.value("kvferry_itl_seconds_sum", model="m") < 23.0


async def test_silence_is_broken_by_comments_and_only_silence(texts: TokenTexts) -> None:
    desk = Desk(texts)
    client = Client()
    desk.stream.attach(client, 0.0, 1000, lambda: None)
    desk.stream.keep_alive(14.9, 15.0)
    assert client.writes == []
    desk.stream.keep_alive(15.0, 15.0)
    desk.stream.keep_alive(20.0, 15.0)
    assert client.writes == [b": keep-alive\n\n"]


def stream_row(desk: Desk, state: str, next_index: int) -> Held:
    return Held(desk.attempt.stream_id, state, next_index)  # type: ignore[arg-type]


async def test_tokens_promised_by_two_heartbeats_are_asked_for_and_fresh_ones_are_not(texts: TokenTexts) -> None:
    desk = Desk(texts)
    desk.say((0, TOKENS[0]))
    assert audit(D, [stream_row(desk, "running", 3)], [desk.attempt]).resend == ()
    asked = audit(D, [stream_row(desk, "running", 5)], [desk.attempt])
    assert asked.resend == ((desk.attempt.stream_id, 1),)
    desk.say((1, TOKENS[1]), (2, TOKENS[2]), (3, TOKENS[3]), (4, TOKENS[4]))
    assert audit(D, [stream_row(desk, "running", 6)], [desk.attempt]).resend == ()
    assert desk.attempt.running


async def test_an_attempt_missing_from_two_heartbeats_of_decode_in_a_row_is_forgotten(texts: TokenTexts) -> None:
    desk = Desk(texts)
    assert audit(D, [], [desk.attempt]).forgotten == ()
    assert audit(D, [stream_row(desk, "fetching", 0)], [desk.attempt]).forgotten == ()
    assert audit(D, [], [desk.attempt]).forgotten == ()
    assert audit(D, [], [desk.attempt]).forgotten == (desk.attempt,)
    for _ in range(3):
        assert audit(P, [], [desk.attempt]).forgotten == (), "P may forget: it has handed over"
    desk.attempt.accepted = False
    assert audit(D, [], [desk.attempt]).forgotten == (), "it has not even accepted yet"
    stranger = Held(999, "running", 1)
    assert audit(D, [stranger], [desk.attempt]).strangers == (stranger,)


async def test_the_table_is_empty_when_all_attempts_are_over_and_remembers_a_bounded_number(texts: TokenTexts) -> None:
    desk = Desk(texts)
    first = desk.attempt.stream_id
    for _ in range(5000):
        desk.table.remove(desk.attempt)
        desk.table.remove(desk.attempt)
        desk.begin()
    desk.table.remove(desk.attempt)
    assert len(desk.table) == 0
    assert desk.table.live() == ()
    assert desk.table.remembered(first) is None
    assert desk.table.remembered(desk.attempt.stream_id) == (bytes(16), desk.attempt.number)


async def test_plain_asgi_gets_the_same_bytes_and_tells_of_a_disconnect() -> None:
    sent: list[bytes] = []
    gone: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()

    async def receive() -> dict[str, str]:
        return await gone

    async def send(message: dict[str, bytes]) -> None:  # type: ignore[type-arg, unused-ignore]
        sent.append(message["body"])

    connection = AsgiConnection(receive, send, max_pending=4)  # type: ignore[arg-type]
    resumed: list[None] = []
    lost: list[None] = []
    connection.watch(lambda: lost.append(None), lambda: resumed.append(None))
    connection.write(b"ab")
    assert not connection.paused
    connection.write(b"cde")
    assert connection.paused
    await turn()
    assert b"".join(sent) == b"abcde"
    assert not connection.paused
    assert len(resumed) == 1
    gone.set_result({"type": "http.disconnect"})
    await turn()
    assert connection.lost
    assert len(lost) == 1
    connection.write(b"nobody reads this")
    await connection.close()
    assert b"".join(sent) == b"abcde"


def scored_desk(texts: TokenTexts) -> Desk:
    desk = Desk(texts)
    desk.stream.scores = PromptScores(10, 1)
    return desk


async def test_a_choice_is_complete_only_with_its_prompts_log_probabilities(texts: TokenTexts) -> None:
    desk = scored_desk(texts)
    desk.say(scored=(1, 5), sender=P)
    desk.say((0, TOKENS[0]), (1, EOS), end=("stop", 2))
    await turn()
    assert not desk.attempt.over.done()
    assert not desk.attempt.running, "P is needed for what is missing"
    assert desk.mail.scored == []
    desk.say(scored=(5, 10), sender=P)
    await turn()
    assert desk.attempt.over.result() == Finished("stop")
    assert desk.attempt.running
    assert desk.mail.scored == [(P, (desk.attempt.stream_id,))]


@pytest.mark.parametrize(("scored", "sender"), [((1, 11), P), ((1, 10), D)], ids=["of another prompt", "by D"])
async def test_log_probabilities_that_can_not_be_end_the_attempt(
    texts: TokenTexts, scored: tuple[int, int], sender: int
) -> None:
    desk = scored_desk(texts)
    desk.say(scored=scored, sender=sender)
    assert desk.attempt.over.result() == Lost("error")


async def test_log_probabilities_that_nobody_asked_for_end_the_attempt(texts: TokenTexts) -> None:
    desk = Desk(texts)
    desk.say(scored=(1, 10), sender=P)
    assert desk.attempt.over.result() == Lost("error")


async def test_columns_that_do_not_fit_are_refused_whole(texts: TokenTexts) -> None:
    desk = scored_desk(texts)
    good = pack_prompt_logprobs(desk.attempt.stream_id, logprobs_of(1, 4))
    for fields in (
        {"ranks": b""},
        {"ranks": good.ranks[:-1]},
        {"logprobs": good.logprobs[:-4]},
        {"top_tokens": b"1234"},
    ):
        bad = msgspec.structs.replace(good, **fields)
        with pytest.raises(MalformedMessage):
            desk.dispatcher.take(TokenBatch(P, 0, b"", b"", b"", prompts=(good, bad)))
    assert desk.stream.scores is not None
    assert desk.stream.scores.next == 1


async def test_a_gap_asks_for_log_probabilities_that_may_have_been_in_it(texts: TokenTexts) -> None:
    desk = scored_desk(texts)
    desk.say(scored=(1, 4), sender=P)
    desk.say((0, TOKENS[0]), sender=P, seq=2)
    assert desk.mail.rescored == [(P, ((desk.attempt.stream_id, 4),))]
    desk.say(scored=(4, 10), sender=P)
    desk.say(sender=P, seq=9)
    assert len(desk.mail.rescored) == 1


async def test_a_heartbeat_shows_log_probabilities_that_never_came(texts: TokenTexts) -> None:
    desk = scored_desk(texts)
    attempt = desk.attempt

    def beat(next_scored: int) -> Held:
        return Held(attempt.stream_id, "ended", 1, next_scored)

    assert audit(P, [beat(6)], [attempt]).resend_prompts == (), "they may be on their way"
    assert audit(D, [beat(6)], [attempt]).resend_prompts == (), "D scores nothing"
    assert audit(P, [beat(10)], [attempt]).resend_prompts == ((attempt.stream_id, 1),)
    desk.say(scored=(1, 10), sender=P)
    assert audit(P, [beat(10)], [attempt]).resend_prompts == ()


async def test_who_has_forgotten_a_prompt_that_lacks_log_probabilities_loses_the_attempt(texts: TokenTexts) -> None:
    desk = scored_desk(texts)
    attempt = desk.attempt
    assert audit(P, [], [attempt]).forgotten == ()
    assert audit(P, [Held(attempt.stream_id, "held", 1, 3)], [attempt]).forgotten == ()
    assert audit(P, [], [attempt]).forgotten == ()
    assert audit(P, [], [attempt]).forgotten == (attempt,)
    desk.say(scored=(1, 10), sender=P)
    assert audit(P, [], [attempt]).forgotten == (), "all of it has come"
