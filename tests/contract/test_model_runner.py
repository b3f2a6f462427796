"""What every ModelRunner must do: torch on a tiny checkpoint in fp32, native in bf16 and int8, the in-memory twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from checkpoints import SHAPES, build
from masks import FixedMask, mask_of
from memory_ranks import ranked_memory
from runners import NATIVE, runner_of

from kvferry.engine import scoring
from kvferry.engine.memory.runner import MemoryRunner, MemorySettings, scored_prompt
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.sampling.sampler import find_logprobs
from kvferry.engine.scoring import joined
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.schedule.step import Draw, ModelRunner, Score, SequenceStep, StepPlan
from kvferry.wire.frame import Piece
from kvferry.wire.logprobs import PromptLogprobs
from kvferry.wire.sampling import Sampling

GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=1.0, top_p=0.95, seed=1234)
PROMPT = np.random.default_rng(0).integers(0, 190, 75).astype(np.uint32)
MEMORY = MemorySettings(num_blocks=32, vocab_size=199, max_model_len=256, num_heads=6, num_kv_heads=3)
MakeRunner = Callable[[], ModelRunner]


@pytest.fixture(scope="module", params=["torch", *NATIVE, "int8", "memory", "memory ranks"])
def make_runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    if request.param.startswith("memory"):
        return lambda: ranked_memory(MEMORY, 2 if request.param == "memory ranks" else 1)
    directory = build(SHAPES[0], tmp_path_factory.mktemp("checkpoint"))
    settings = EngineSettings(directory, num_blocks=32, threads=1)
    if request.param == "torch":
        return lambda: runner_of("torch", settings)
    settings = replace(settings, dtype="bfloat16", threads=2)
    if request.param == "int8":
        return lambda: runner_of("native", replace(settings, quantization="int8"))
    return lambda: runner_of(request.param, settings)


@pytest.fixture
def runner(make_runner: MakeRunner) -> Iterator[ModelRunner]:
    runner = make_runner()
    yield runner
    runner.close()


def table(*blocks: int) -> np.ndarray:
    return np.asarray(blocks, np.int32)


def prefill(runner: ModelRunner, blocks: np.ndarray, tokens: np.ndarray, size: int, draw: Draw) -> int | None:
    drawn: int | None = None
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        last = start + size >= len(tokens)
        plan = StepPlan((SequenceStep(0, chunk, start, blocks, draw if last else None),))
        (drawn,) = runner.execute(plan).tokens
        assert (drawn is not None) == last
    return drawn


def generate(
    runner: ModelRunner, blocks: np.ndarray, sampling: Sampling, count: int, size: int = 512, choice: int = 0
) -> list[int]:
    tokens: list[int] = []
    for index in range(count):
        draw = Draw(sampling, choice, index, np.asarray([*PROMPT, *tokens], np.uint32), len(PROMPT))
        if index == 0:
            drawn = prefill(runner, blocks, PROMPT, size, draw)
        else:
            step = SequenceStep(0, np.asarray(tokens[-1:], np.uint32), len(PROMPT) + index - 1, blocks, draw)
            (drawn,) = runner.execute(StepPlan((step,))).tokens
        assert drawn is not None
        assert 0 <= drawn < runner.vocab_size
        tokens.append(drawn)
    return tokens


def all_of(runner: ModelRunner, start: int, end: int) -> Piece:
    return Piece(0, runner.kv_format.num_layers, start, end, 0, runner.kv_format.num_kv_heads)


def slot_for(runner: ModelRunner, piece: Piece) -> bytearray:
    return bytearray(piece.num_bytes(runner.kv_format.head_dim, runner.kv_format.dtype))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_do_not_depend_on_chunks_or_blocks(runner: ModelRunner, sampling: Sampling) -> None:
    whole = generate(runner, table(0, 1, 2, 3, 4, 5), sampling, 12)
    assert generate(runner, table(31, 7, 30, 9, 2, 8), sampling, 12, size=16) == whole
    assert generate(runner, table(5, 4, 3, 2, 1, 0), sampling, 12, size=11) == whole


def test_seed_and_choice_change_seeded_tokens_but_not_greedy_ones(runner: ModelRunner) -> None:
    blocks = table(0, 1, 2, 3, 4, 5)
    seeded = generate(runner, blocks, SEEDED, 12)
    assert generate(runner, blocks, SEEDED, 12, choice=1) != seeded
    assert generate(runner, blocks, Sampling(temperature=1.0, top_p=0.95, seed=1235), 12) != seeded
    greedy = generate(runner, blocks, GREEDY, 12)
    assert generate(runner, blocks, Sampling(temperature=0, seed=99), 12, choice=1) == greedy


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": -2.0}, {"presence_penalty": -2.0}, {"repetition_penalty": 9.0}]
)
def test_every_runner_honours_penalties(runner: ModelRunner, sampling: Sampling, penalty: dict[str, float]) -> None:
    blocks, penalised = table(0, 1, 2, 3, 4, 5), msgspec.structs.replace(sampling, **penalty)
    text = generate(runner, blocks, penalised, 16)
    assert text != generate(runner, blocks, sampling, 16)
    assert generate(runner, blocks, penalised, 16, size=11) == text


def test_every_runner_honours_biases_and_bans(runner: ModelRunner) -> None:
    blocks, plain = table(0, 1, 2, 3, 4, 5), generate(runner, table(0, 1, 2, 3, 4, 5), GREEDY, 1)[0]
    other = 7 if plain != 7 else 8
    for sampling, wanted in (
        (msgspec.structs.replace(GREEDY, logit_bias=((other, 100.0),)), True),
        (msgspec.structs.replace(GREEDY, banned=(plain,)), False),
        (msgspec.structs.replace(GREEDY, min_tokens=1, stop_token_ids=(plain,)), False),
        (msgspec.structs.replace(GREEDY, min_tokens=0, stop_token_ids=(plain,)), None),
    ):
        draw = Draw.of(sampling, 0, 0, PROMPT, len(PROMPT))
        token = runner.execute(StepPlan((SequenceStep(0, PROMPT, 0, blocks, draw),))).tokens[0]
        assert token == plain if wanted is None else (token == other if wanted else token != plain)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_every_runner_draws_through_the_mask_of_a_grammar(runner: ModelRunner, sampling: Sampling) -> None:
    rng = np.random.default_rng(2)
    for index in range(6):
        allowed = np.zeros(runner.vocab_size, np.bool_)
        allowed[rng.choice(runner.vocab_size, 5, replace=False)] = True
        draw = Draw(sampling, 0, index, PROMPT, 70, logit_bias=((3, 5.0),), mask=mask_of(allowed))
        token = prefill(runner, table(1, 2, 3, 4, 5), PROMPT, 40, draw)
        assert token is not None
        assert allowed[token]


def test_what_is_drawn_by_a_grammar_that_failed_is_no_token_and_others_keep_theirs(runner: ModelRunner) -> None:
    failed = FixedMask(np.ones(-(-runner.vocab_size // 32), np.uint32), fault="it failed")
    steps = (
        SequenceStep(0, PROMPT, 0, table(1, 2, 3, 4, 5), Draw(GREEDY, 0, 0, num_logprobs=1)),
        SequenceStep(1, PROMPT, 0, table(6, 7, 8, 9, 10), Draw(GREEDY, 0, 0, num_logprobs=1, mask=failed)),
    )
    result = runner.execute(StepPlan(steps))
    alone = prefill(runner, table(11, 12, 13, 14, 15), PROMPT, 100, Draw(GREEDY, 0, 0))
    assert result.tokens == (alone, None)
    assert (result.logprobs_of(0) is not None, result.logprobs_of(1)) == (True, None)


def test_log_probabilities_come_back_where_they_were_asked_for(runner: ModelRunner) -> None:
    plan = StepPlan(
        (
            SequenceStep(0, PROMPT[:20], 0, table(0, 1), Draw(GREEDY, 0, 0, num_logprobs=3)),
            SequenceStep(1, PROMPT[:9], 0, table(2)),
            SequenceStep(2, PROMPT[:9], 0, table(3), Draw(GREEDY, 0, 0)),
        )
    )
    result = runner.execute(plan)
    assert result.logprobs[1:] == (None, None)
    found = result.logprobs[0]
    assert found is not None
    assert (found.rank, found.top_tokens[0], found.top_logprobs[0]) == (1, result.tokens[0], found.logprob)
    assert 0 > found.logprob > found.top_logprobs[1] > found.top_logprobs[2]
    assert runner.execute(StepPlan(plan.steps[1:])).logprobs == ()


def scores(runner: ModelRunner, size: int, num_top: int, blocks: np.ndarray, first: int = 1) -> PromptLogprobs:
    """Of PROMPT from position `first` on, in chunks of `size` rows, beside another sequence that draws."""
    beside = SequenceStep(9, PROMPT[:5], 0, table(31), Draw(GREEDY, 0, 0))
    found: list[PromptLogprobs] = []
    for start in range(0, len(PROMPT), size):
        targets = PROMPT[max(first, start + 1) : start + size + 1]
        row = max(first - 1 - start, 0)
        score = Score(row, targets, num_top) if len(targets) and row < size else None
        draw = Draw(GREEDY, 0, 0) if start + size >= len(PROMPT) else None
        step = SequenceStep(0, PROMPT[start : start + size], start, blocks, draw, score)
        result = runner.execute(StepPlan((beside, step) if start % 2 else (step, beside)))
        part = result.scores_of(1 if start % 2 else 0)
        assert (part is None) == (score is None)
        if part is not None:
            assert part.start == max(first, start + 1)
            found.append(part)
    assert [part.start for part in found[1:]] == [part.end for part in found[:-1]]
    return joined(found)


def test_known_tokens_are_scored_by_the_logits_before_them(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = table(7, 1, 9, 2, 4)
    whole = scores(runner, len(PROMPT), 20, blocks)
    assert (whole.start, whole.end) == (1, len(PROMPT))
    if isinstance(runner, MemoryRunner):
        wanted = scored_prompt(MEMORY, PROMPT.tolist(), 20)
    else:
        assert isinstance(runner, (TorchRunner, NativeRunner))
        (logits,) = runner.logits(StepPlan((SequenceStep(0, PROMPT, 0, blocks),)))
        wanted = [find_logprobs(row, int(token), 20) for row, token in zip(logits, PROMPT[1:], strict=False)]
    assert whole.ranks.tolist() == [row.rank for row in wanted]
    assert whole.top_tokens.tolist() == [list(row.top_tokens) for row in wanted]
    expected = np.array([(row.logprob, *row.top_logprobs) for row in wanted], np.float32)
    np.testing.assert_allclose(whole.logprobs, expected, rtol=0, atol=0 if runner.exact else 2e-6)
    # In chunks, with logits of three rows at a time, from somewhere in the middle of a chunk.
    monkeypatch.setattr(scoring, "MAX_LOGITS_BYTES", 3 * 4 * runner.vocab_size)
    for size, num_top, first in ((75, 20, 1), (16, 2, 1), (11, 0, 30)):
        part, rows = scores(runner, size, num_top, table(3, 8, 5, 6, 0), first), slice(first - 1, None)
        np.testing.assert_allclose(
            part.logprobs, whole.logprobs[rows, : num_top + 1], rtol=0, atol=0 if runner.exact else 1e-5
        )
        if runner.exact:
            assert np.array_equal(part.ranks, whole.ranks[rows])
            assert np.array_equal(part.top_tokens, whole.top_tokens[rows, :num_top])


def test_a_scored_step_draws_what_it_draws_without(runner: ModelRunner) -> None:
    draws = [Draw(SEEDED, 0, index, num_logprobs=2) for index in range(4)]
    plain = [SequenceStep(n, PROMPT[: 20 + n], 0, table(4 * n, 4 * n + 1), draw) for n, draw in enumerate(draws)]
    scored = list(plain)
    scored[1] = replace(plain[1], score=Score(2, PROMPT[3:21], 1))
    with_scores, without = runner.execute(StepPlan(tuple(scored))), runner.execute(StepPlan(tuple(plain)))
    assert with_scores.tokens == without.tokens
    assert with_scores.logprobs == without.logprobs or not runner.exact
    assert [found is not None for found in with_scores.scores] == [False, True, False, False]
    assert without.scores == ()


@pytest.mark.parametrize("score", [Score(0, PROMPT[:6], 1), Score(5, PROMPT[:1], 1), Score(0, PROMPT[:1], 21),
                                   Score(0, np.asarray([199], np.uint32), 1)])  # fmt: skip
def test_rows_and_tokens_that_are_not_there_are_not_scored(runner: ModelRunner, score: Score) -> None:
    with pytest.raises(RuntimeError):
        runner.execute(StepPlan((SequenceStep(0, PROMPT[:5], 0, table(0), score=score),)))


def test_tokens_do_not_depend_on_the_batch(runner: ModelRunner) -> None:
    alone = generate(runner, table(0, 1, 2, 3, 4, 5), SEEDED, 2)
    other = table(10, 11, 12, 13)
    own = table(20, 21, 22, 23, 24, 25)
    draws = [Draw(SEEDED, 0, 0), Draw(SEEDED, 0, 1)]
    first = StepPlan((SequenceStep(1, PROMPT[5:25], 0, other), SequenceStep(0, PROMPT, 0, own, draws[0])))
    nothing, token = runner.execute(first).tokens
    assert nothing is None
    second = StepPlan(
        (
            SequenceStep(0, np.asarray([token], np.uint32), 75, own, draws[1]),
            SequenceStep(1, PROMPT[25:26], 20, other, draws[0]),
        )
    )
    assert [token, runner.execute(second).tokens[0]] == alone


def test_a_handed_off_sequence_goes_on_as_if_it_had_stayed(make_runner: MakeRunner) -> None:
    source, target = make_runner(), make_runner()
    assert source.kv_format == target.kv_format
    assert source.numerics_id == target.numerics_id
    here, there = table(9, 1, 5, 3, 7, 0), table(2, 30, 4, 6, 1, 12)
    expected = generate(source, here, GREEDY, 8)
    # In pieces of one layer and 20 tokens, in reverse order.
    for layer in reversed(range(source.kv_format.num_layers)):
        for start in (60, 40, 20, 0):
            piece = Piece(layer, layer + 1, start, min(start + 20, 75), 0, source.kv_format.num_kv_heads)
            slot = slot_for(source, piece)
            source.gather(piece, here, memoryview(slot))
            target.scatter(piece, there, memoryview(slot))
    tokens = expected[:1]
    for index in range(1, 8):
        step = SequenceStep(0, np.asarray(tokens[-1:], np.uint32), 74 + index, there, Draw(GREEDY, 0, index))
        (token,) = target.execute(StepPlan((step,))).tokens
        assert token is not None
        tokens.append(token)
    assert tokens == expected
    piece = all_of(source, 0, 75)
    sent, got = slot_for(source, piece), slot_for(source, piece)
    source.gather(piece, here, memoryview(sent))
    target.gather(piece, there, memoryview(got))
    assert sent == got
    assert any(sent)


def test_scatter_writes_its_piece_and_nothing_else(runner: ModelRunner) -> None:
    blocks = table(9, 1, 5)
    before, after = slot_for(runner, everything := all_of(runner, 0, 48)), slot_for(runner, all_of(runner, 0, 48))
    runner.execute(StepPlan((SequenceStep(0, PROMPT[:48], 0, blocks),)))
    runner.gather(everything, blocks, memoryview(before))
    piece = Piece(1, 2, 15, 33, 1, 2)
    mark = np.full(len(slot_for(runner, piece)), 0x3C, np.uint8)
    runner.scatter(piece, blocks, memoryview(mark.tobytes()))  # read-only is fine
    runner.gather(everything, blocks, memoryview(after))
    kv_format = runner.kv_format
    shape = (kv_format.num_layers, 2, 48, kv_format.num_kv_heads, -1)
    old = np.frombuffer(before, np.uint8).reshape(shape).copy()
    old[1:2, :, 15:33, 1:2] = 0x3C
    assert np.array_equal(old, np.frombuffer(after, np.uint8).reshape(shape))


def test_a_step_writes_only_its_own_rows(runner: ModelRunner) -> None:
    blocks = table(9, 1, 5)
    runner.execute(StepPlan((SequenceStep(0, PROMPT[:40], 0, blocks),)))
    piece = all_of(runner, 0, 40)
    before, after = slot_for(runner, piece), slot_for(runner, piece)
    runner.gather(piece, blocks, memoryview(before))
    runner.execute(
        StepPlan((SequenceStep(0, PROMPT[40:41], 40, blocks), SequenceStep(1, PROMPT, 0, table(2, 3, 4, 6, 7))))
    )
    runner.gather(piece, blocks, memoryview(after))
    assert before == after


@pytest.mark.parametrize(
    "step",
    [
        SequenceStep(0, PROMPT[:0], 0, table(0)),
        SequenceStep(0, PROMPT[:17], 0, table(0)),
        SequenceStep(0, PROMPT[:1], 16, table(0)),
        SequenceStep(0, PROMPT[:1], 0, table(32)),
        SequenceStep(0, PROMPT[:1], 0, table(-1)),
        SequenceStep(0, PROMPT[:1], 256, table(*range(32))),
        SequenceStep(0, np.asarray([199], np.uint32), 0, table(0)),
    ],
    ids=["no tokens", "table too short", "start behind the table", "block too high", "block negative",
         "over max_model_len", "token outside the vocabulary"],
)  # fmt: skip
def test_a_plan_outside_the_cache_is_refused_before_anything_is_written(
    runner: ModelRunner, step: SequenceStep
) -> None:
    good = SequenceStep(1, PROMPT[:16], 0, table(3))
    piece = all_of(runner, 0, 16)
    before, after = slot_for(runner, piece), slot_for(runner, piece)
    runner.gather(piece, table(3), memoryview(before))
    with pytest.raises(RuntimeError):
        runner.execute(StepPlan((good, step)))
    runner.gather(piece, table(3), memoryview(after))
    assert before == after


@pytest.mark.parametrize(
    ("piece", "extra"),
    [
        (Piece(0, 1, 0, 8, 0, 1), 1), (Piece(0, 1, 0, 8, 0, 1), -1), (Piece(0, 1, 8, 40, 0, 1), 0),
        (Piece(0, 9, 0, 8, 0, 1), 0), (Piece(0, 1, 0, 8, 0, 9), 0), (Piece(1, 1, 0, 8, 0, 1), 0),
        (Piece(0, 1, 8, 8, 0, 1), 0), (Piece(0, 1, 0, 8, 2, 1), 0),
    ],
)  # fmt: skip
def test_a_piece_or_buffer_that_does_not_fit_is_refused(runner: ModelRunner, piece: Piece, extra: int) -> None:
    size = max(piece.num_bytes(runner.kv_format.head_dim, runner.kv_format.dtype) + extra, 0)
    for move in (runner.gather, runner.scatter):
        with pytest.raises(RuntimeError):
            move(piece, table(0, 1), memoryview(bytearray(size)))


def test_warm_up_changes_no_block(runner: ModelRunner) -> None:
    every_block = np.arange(32, dtype=np.int32).reshape(2, 16)  # as two sequences of the greatest length
    piece = all_of(runner, 0, 256)
    for blocks in every_block:
        runner.scatter(piece, blocks, memoryview(bytearray(b"\x11" * len(slot_for(runner, piece)))))
    runner.warm_up()
    for blocks in every_block:
        after = slot_for(runner, piece)
        runner.gather(piece, blocks, memoryview(after))
        assert set(after) == {0x11}


def test_an_empty_plan_is_a_step_without_tokens(runner: ModelRunner) -> None:
    assert runner.execute(StepPlan(())).tokens == ()
