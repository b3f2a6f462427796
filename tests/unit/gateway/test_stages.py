"""Where a request's time went, from what its workers told and when its tokens came. No sockets, no bus."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from scripted_worker import tokens_of, write_model
from unit.gateway.test_streams import D, Desk, P, turn

from kvferry.text.detokenizer import TokenTexts
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.beats import Held, SequenceState
from kvferry.wire.fields import pack_tokens
from kvferry.wire.tokens import Spent, TokenBatch
from kvferry_gateway.streams.attempt import audit
from kvferry_gateway.streams.phase import phase_of, progress_of
from kvferry_gateway.streams.stages import Course, shares_of
from kvferry_gateway.streams.timeline import Timeline

PLACED = Course(
    placed_at=10.0, until=12.0, pulls=True, waits_in="queue", first_token_at=None, computed=None, drawn_at=None,
    drawn=None, running=False,
)  # fmt: skip
BEGUN = replace(PLACED, first_token_at=11.0, computed=Spent(1, waiting_s=0.25, computing_s=0.5))
TOKENS = tokens_of("xyz")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TokenTexts:
    return TokenTexts(Tokenizer(write_model(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.mark.parametrize(
    ("course", "shares"),
    [
        (PLACED, {"queue": 2.0}),
        (replace(PLACED, waits_in="lost"), {"lost": 2.0}),
        (BEGUN, {"queue": 0.25, "prefill": 0.5, "messages": 0.25, "transfer": 1.0}),
        (
            replace(BEGUN, drawn_at=11.5, drawn=Spent(1, waiting_s=0.6, fetching_s=0.7, step_s=0.125), running=True),
            {"queue": 0.25, "prefill": 0.5, "messages": 0.25, "transfer": 0.375, "first step": 0.125, "decode": 0.5},
        ),
        (replace(BEGUN, pulls=False), {"queue": 0.25, "prefill": 0.5, "messages": 0.25, "decode": 1.0}),
        (replace(BEGUN, computed=None, running=True), {"prefill": 1.0, "decode": 1.0}),
        # D's batch was here before P's, and a worker's clock runs by itself.
        (
            replace(BEGUN, computed=Spent(1, waiting_s=3.0, computing_s=0.75), drawn_at=10.9, drawn=Spent(1, 0.0)),
            {"queue": 0.25, "prefill": 0.75, "messages": 0.0, "transfer": 0.0, "first step": 0.0, "decode": 1.0},
        ),
    ],
)
def test_each_stage_has_its_share_and_all_of_them_are_the_whole_time(course: Course, shares: dict[str, float]) -> None:
    told = shares_of(course)
    assert told == pytest.approx(shares)
    assert list(told) == list(shares), "in their order"
    assert sum(told.values()) == pytest.approx(course.until - course.placed_at)


def tell(desk: Desk, sender: int, index: int, spent: Spent) -> None:
    ids = pack_tokens([desk.attempt.stream_id])
    batch = TokenBatch(sender, 0, ids, pack_tokens([index]), pack_tokens([TOKENS[index]]), spent=(spent,))
    desk.dispatcher.take(batch)


async def test_the_shares_of_a_timeline_go_over_all_its_attempts(texts: TokenTexts) -> None:
    desk, moment = Desk(texts), asyncio.get_running_loop().time()
    timeline = Timeline(1, "r", "m", 0, 3, moment - 100.0, desk.stream)
    assert timeline.shares(moment) == pytest.approx({"placement": 100.0})
    desk.attempt.forecast.placed_at = moment - 90.0
    timeline.placed(desk.attempt)
    timeline.lost("decode_gone")
    desk.table.remove(desk.attempt)
    desk.begin().forecast.placed_at = moment + 50.0
    timeline.placed(desk.attempt)
    tell(desk, P, 0, Spent(desk.attempt.stream_id, waiting_s=2.0, computing_s=1.0))
    await turn()
    desk.attempt.forecast.first_token_at = moment + 60.0
    tell(desk, D, 1, Spent(desk.attempt.stream_id, waiting_s=0.0, fetching_s=5.0, step_s=1.0))
    desk.attempt.spent[D] = (moment + 64.0, desk.attempt.spent[D][1])
    shares = timeline.shares(moment + 70.0)
    assert shares == pytest.approx(
        {"placement": 60.0, "lost": 90.0, "queue": 2.0, "prefill": 1.0, "messages": 7.0, "transfer": 3.0,
         "first step": 1.0, "decode": 6.0}, abs=0.5,
    )  # fmt: skip
    assert sum(shares.values()) == pytest.approx(170.0)
    timeline.end("stop")
    assert timeline.shares(moment + 999.0) == timeline.shares(moment), "it has ended"


@pytest.mark.parametrize(
    ("sender", "state", "phase", "progress"),
    [
        (P, "waiting", "queued", None),
        (P, "computing", "prefill", (1024, 4096)),
        (P, "held", "kv", None),
        (D, "opening", "queued", None),
        (D, "running", "decode", None),
    ],
)
async def test_a_row_of_a_heartbeat_tells_the_phase_and_how_far_it_is(
    texts: TokenTexts, sender: int, state: SequenceState, phase: str, progress: tuple[int, int] | None
) -> None:
    desk = Desk(texts)
    audit(sender, [Held(desk.attempt.stream_id, state, 0, 0, 1024, 4096)], [desk.attempt])
    assert (phase_of(desk.attempt), progress_of(desk.attempt)) == (phase, progress)


async def test_kv_on_its_way_is_told_by_the_worker_that_fetches_it(texts: TokenTexts) -> None:
    desk = Desk(texts)
    audit(P, [Held(desk.attempt.stream_id, "computing", 0, 0, 16, 64)], [desk.attempt])
    audit(D, [Held(desk.attempt.stream_id, "fetching", 0, 0, 100, 400)], [desk.attempt])
    assert (phase_of(desk.attempt), progress_of(desk.attempt)) == ("prefill", (16, 64)), "most of it hides behind"
    audit(P, [Held(desk.attempt.stream_id, "held", 1)], [desk.attempt])
    assert (phase_of(desk.attempt), progress_of(desk.attempt)) == ("kv", (100, 400))
    audit(D, [Held(desk.attempt.stream_id, "fetching", 0)], [desk.attempt])
    assert progress_of(desk.attempt) is None, "an older worker does not say"
