"""Tokens and ends reach the gateway, whatever the bus loses, or are let go when nobody wants them."""

from __future__ import annotations

import numpy as np
from sequences import GATEWAY, work_of

from kvferry.wire.beats import Held
from kvferry.wire.fields import unpack_tokens
from kvferry.wire.logprobs import PromptLogprobs, TokenLogprobs, unpack_logprobs, unpack_prompt_logprobs
from kvferry.wire.messages import Codecs
from kvferry.wire.sampling import MAX_LOGPROBS
from kvferry.wire.tokens import MAX_SCORED_ROWS, Spent, TokenBatch
from kvferry.worker.outbox import (
    MAX_BATCH_CACHED,
    MAX_BATCH_ENDS,
    MAX_BATCH_LOGPROBS,
    MAX_BATCH_SPENT,
    MAX_BATCH_TOKENS,
    REPEAT_END_S,
    Outbox,
)


def rows(batch: TokenBatch) -> list[tuple[int, int, int]]:
    columns = (unpack_tokens(column).tolist() for column in (batch.stream_ids, batch.indices, batch.tokens))
    return list(zip(*columns, strict=True))


def taken(outbox: Outbox) -> list[TokenBatch]:
    return [batch for _, batch in outbox.take()]


def test_tokens_of_all_streams_of_a_gateway_share_one_batch() -> None:
    outbox = Outbox(9)
    first, second, elsewhere = work_of(4), work_of(4, generated=[1, 2]), work_of(4, gateway_incarnation=5, gateway="g5")
    for work in (first, second, elsewhere):
        outbox.open(work)
    outbox.token(first, 0, 11)
    outbox.token(second, 2, 12)
    outbox.token(elsewhere, 0, 13)
    batches = dict(outbox.take())
    assert rows(batches[first.gateway]) == [(first.stream_id, 0, 11), (second.stream_id, 2, 12)]
    assert rows(batches["g5"]) == [(elsewhere.stream_id, 0, 13)]
    assert outbox.take() == []
    outbox.token(first, 1, 14)
    assert [(b.batch_seq, b.incarnation) for b in taken(outbox)] == [(1, 9)]


def test_an_end_is_repeated_until_it_is_acknowledged() -> None:
    outbox = Outbox(9)
    work = work_of(4)
    outbox.open(work)
    outbox.token(work, 0, 5)
    outbox.end(work, "length", "", 10.0)
    outbox.end(work, "stop", "", 10.0)
    assert [(e.reason, e.index) for e in taken(outbox)[0].ends] == [("length", 1)]
    outbox.repeat_ends(10.0 + REPEAT_END_S - 0.01)
    assert taken(outbox) == []
    outbox.repeat_ends(10.0 + REPEAT_END_S)
    assert [e.reason for e in taken(outbox)[0].ends] == ["length"]
    outbox.acknowledge(GATEWAY, (work.stream_id,))
    outbox.repeat_ends(99.0)
    assert taken(outbox) == []
    assert len(outbox) == 0


def test_an_acknowledgement_of_a_stream_that_has_not_ended_is_ignored() -> None:
    outbox = Outbox(9)
    work = work_of(4)
    outbox.open(work)
    outbox.acknowledge(GATEWAY, (work.stream_id, 12345))
    outbox.acknowledge(4711, (work.stream_id,))
    assert len(outbox) == 1


def test_a_resend_gives_tokens_from_its_index_on_and_the_end_once_however_often_it_names_a_stream() -> None:
    outbox = Outbox(9)
    work = work_of(4, generated=[1, 2])
    outbox.open(work)
    for index in range(2, 6):
        outbox.token(work, index, index * 10)
    outbox.cached(work, 3)
    outbox.end(work, "stop", "", 0.0)
    outbox.take()
    outbox.resend(GATEWAY, ((work.stream_id, 4),) * 1000 + ((999, 0),))
    [batch] = taken(outbox)
    assert rows(batch) == [(work.stream_id, 4, 40), (work.stream_id, 5, 50)]
    assert [e.index for e in batch.ends] == [6]
    assert batch.cached == ((work.stream_id, 3),)
    outbox.resend(4711, ((work.stream_id, 0),))
    assert taken(outbox) == []


def test_a_newer_attempt_under_the_same_stream_id_hears_nothing_of_the_older_one() -> None:
    outbox = Outbox(9)
    old = work_of(4)
    new = work_of(4, stream_id=old.stream_id)
    outbox.open(old)
    outbox.open(new)
    outbox.token(old, 0, 5)
    outbox.end(old, "error", "", 0.0)
    outbox.close(old)
    assert taken(outbox) == []
    outbox.token(new, 0, 6)
    assert rows(taken(outbox)[0]) == [(new.stream_id, 0, 6)]


def test_a_flood_is_split_and_the_largest_batch_stays_under_the_default_payload_of_nats() -> None:
    outbox = Outbox((1 << 64) - 1)
    works = [work_of(1, stream_id=(1 << 32) - 1 - n, max_tokens=1 << 20) for n in range(MAX_BATCH_ENDS + 1)]
    for work in works:
        outbox.open(work)
    for index in range(MAX_BATCH_TOKENS + 1):
        outbox.token(works[0], index, (1 << 32) - 1)
    for _ in range(MAX_BATCH_CACHED):
        outbox.cached(works[0], 1 << 31)
    for _ in range(MAX_BATCH_SPENT + 1):
        outbox.spent(works[0], Spent((1 << 32) - 1, 0.1, 0.2, 0.3, 0.4))
    outbox.scored(works[0], of_prompt(1, 1 + MAX_SCORED_ROWS))
    for work in works:
        outbox.end(work, "transfer_failed", "\U0001f600" * 2000, 0.0)
    batches = taken(outbox)
    assert [len(rows(batch)) for batch in batches] == [MAX_BATCH_TOKENS, 1]
    assert [len(batch.ends) for batch in batches] == [MAX_BATCH_ENDS, 1]
    assert [len(batch.spent) for batch in batches] == [MAX_BATCH_SPENT, 1]
    assert [batch.batch_seq for batch in batches] == [0, 1]
    assert len(Codecs().to_gateway.encode(batches[0])) < 1 << 20


def test_where_the_time_of_a_stream_went_is_told_again_with_its_tokens() -> None:
    outbox = Outbox(9)
    work = work_of(4)
    spent = Spent(work.stream_id, 0.25, 0.5)
    outbox.open(work)
    outbox.token(work, 0, 11)
    outbox.spent(work, spent)
    assert [batch.spent for batch in taken(outbox)] == [(spent,)]
    outbox.token(work, 1, 12)
    assert [batch.spent for batch in taken(outbox)] == [()]
    outbox.resend(work.gateway_incarnation, ((work.stream_id, 0),))
    assert [batch.spent for batch in taken(outbox)] == [(spent,)]


def test_a_forgotten_gateway_leaves_nothing() -> None:
    outbox = Outbox(9)
    work = work_of(4)
    outbox.open(work)
    outbox.token(work, 0, 5)
    outbox.forget_gateway(GATEWAY)
    outbox.token(work, 1, 5)
    outbox.end(work, "stop", "", 0.0)
    assert outbox.take() == []
    assert len(outbox) == 0


def test_ended_streams_are_reported_until_they_are_acknowledged() -> None:
    outbox = Outbox(9)
    work = work_of(4)
    outbox.open(work)
    assert outbox.held() == {}
    outbox.end(work, "stop", "", 0.0)
    assert [(h.stream_id, h.state, h.next_index) for h in outbox.held()[work.gateway]] == [(work.stream_id, "ended", 0)]
    assert outbox.ended(GATEWAY) == [work]
    assert outbox.ended(4711) == []


def found(token: int, count: int = 2) -> TokenLogprobs:
    return TokenLogprobs(-1.0, tuple(range(token, token + count)), tuple(-float(place) for place in range(count)))


def scored(batch: TokenBatch) -> dict[int, TokenLogprobs]:
    """By row."""
    return dict(unpack_logprobs(batch.logprobs, len(rows(batch)))) if batch.logprobs else {}


def test_log_probabilities_stay_with_their_rows_and_are_sent_again_with_them() -> None:
    outbox = Outbox(9)
    plain, wanting = work_of(4), work_of(4)
    for work in (plain, wanting):
        outbox.open(work)
    outbox.token(plain, 0, 11)
    assert taken(outbox)[0].logprobs is None, "nobody wants any"
    outbox.token(plain, 1, 12)
    outbox.token(wanting, 0, 21, found(21))
    outbox.token(plain, 2, 13)
    outbox.token(wanting, 1, 22, found(22))
    assert scored(taken(outbox)[0]) == {1: found(21), 3: found(22)}
    outbox.resend(GATEWAY, ((wanting.stream_id, 1), (plain.stream_id, 2)))
    batch = taken(outbox)[0]
    assert rows(batch) == [(wanting.stream_id, 1, 22), (plain.stream_id, 2, 13)]
    assert scored(batch) == {0: found(22)}
    assert taken(outbox) == []


def test_a_flood_of_log_probabilities_is_split_and_stays_under_the_default_payload_of_nats() -> None:
    outbox = Outbox((1 << 64) - 1)
    work, plain = work_of(1, max_tokens=1 << 20), work_of(1, max_tokens=1 << 20)
    outbox.open(work)
    outbox.open(plain)
    most = TokenLogprobs(-1.0, ((1 << 32) - 1,) * MAX_LOGPROBS, (-1.0,) * MAX_LOGPROBS)
    for index in range(MAX_BATCH_TOKENS):
        outbox.token(plain, index, (1 << 32) - 1)
        if index % 8 == 0:
            outbox.token(work, index // 8, (1 << 32) - 1, most)
    batches = taken(outbox)
    assert sum(len(rows(batch)) for batch in batches) == MAX_BATCH_TOKENS * 9 // 8
    assert [index for batch in batches for s, index, _ in rows(batch) if s == work.stream_id] == [
        *range(MAX_BATCH_TOKENS // 8)
    ]
    for batch in batches:
        assert len(scored(batch)) <= MAX_BATCH_LOGPROBS
        wanting = [row for row, (stream_id, _, _) in enumerate(rows(batch)) if stream_id == work.stream_id]
        assert list(scored(batch)) == wanting
        assert len(Codecs().to_gateway.encode(batch)) < 1 << 20
    assert len(batches) >= 2


def of_prompt(start: int, end: int) -> PromptLogprobs:
    """Marked by their positions."""
    places = np.arange(start, end)
    return PromptLogprobs(
        start, places.astype(np.uint32), np.zeros((len(places), 20), np.uint32), np.zeros((len(places), 21), np.float32)
    )


def prompts(batches: list[TokenBatch]) -> list[tuple[int, int, list[int]]]:
    runs = [(columns.stream_id, unpack_prompt_logprobs(columns)) for batch in batches for columns in batch.prompts]
    return [(stream_id, run.start, run.ranks.tolist()) for stream_id, run in runs]


def test_a_prompts_log_probabilities_go_out_in_batches_of_bounded_size_and_in_order() -> None:
    outbox = Outbox(9)
    work, other = work_of(4), work_of(4)
    outbox.open(work)
    outbox.open(other)
    outbox.scored(work, of_prompt(1, 2 * MAX_SCORED_ROWS))
    outbox.scored(other, of_prompt(1, 4))
    outbox.token(work, 0, 7)
    batches = taken(outbox)
    found = prompts(batches)
    assert [(stream_id, start) for stream_id, start, _ in found] == [
        (work.stream_id, 1), (work.stream_id, 1 + MAX_SCORED_ROWS), (other.stream_id, 1),
    ]  # fmt: skip
    assert [rank for _, _, run in found[:2] for rank in run] == list(range(1, 2 * MAX_SCORED_ROWS))
    assert all(sum(len(c.ranks) // 4 for c in batch.prompts) <= MAX_SCORED_ROWS for batch in batches)
    assert [row for batch in batches for row in rows(batch)] == [(work.stream_id, 0, 7)]
    assert outbox.next_scored(work) == 2 * MAX_SCORED_ROWS


def test_a_prompts_log_probabilities_are_kept_until_they_are_acknowledged_whoever_has_the_stream_by_then() -> None:
    outbox = Outbox(9)
    work = work_of(4)
    outbox.open(work)
    outbox.scored(work, of_prompt(1, 5))
    outbox.scored(work, of_prompt(5, 9))
    outbox.token(work, 0, 3)
    outbox.leave(work)
    outbox.take()
    assert outbox.held() == {work.gateway: [Held(work.stream_id, "ended", 1, 9)]}
    assert outbox.ended(GATEWAY) == [work]
    outbox.resend(GATEWAY, (), ((work.stream_id, 3),))
    assert prompts(taken(outbox)) == [(work.stream_id, 3, [3, 4]), (work.stream_id, 5, [5, 6, 7, 8])]
    outbox.acknowledge(GATEWAY, (), (work.stream_id,))
    assert len(outbox) == 0


def test_a_stream_whose_log_probabilities_have_arrived_is_left_without_a_trace() -> None:
    outbox = Outbox(9)
    work = work_of(4)
    outbox.open(work)
    outbox.scored(work, of_prompt(1, 5))
    outbox.acknowledge(GATEWAY, (), (work.stream_id,))
    assert len(outbox) == 1, "its tokens are to come"
    assert outbox.next_scored(work) == 0
    outbox.leave(work)
    assert len(outbox) == 0


def test_a_gateway_that_wants_nothing_more_ends_what_is_kept() -> None:
    outbox = Outbox(9)
    for end in (outbox.close, lambda work: outbox.acknowledge(GATEWAY, (work.stream_id,))):
        work = work_of(4)
        outbox.open(work)
        outbox.scored(work, of_prompt(1, 5))
        outbox.leave(work)
        end(work)
        assert len(outbox) == 0
