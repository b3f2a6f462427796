"""The in-memory twin: its tokens follow from the text alone, and any wrong KV byte changes them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from memory_ranks import ranked_memory

from kvferry.engine.memory.runner import MemoryRunner, MemorySettings, continuation
from kvferry.engine.ranks.following import DirectChannel
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.frame import Piece
from kvferry.wire.sampling import Sampling

SETTINGS = MemorySettings(num_blocks=16, vocab_size=50_000)
PROMPT = np.arange(1, 41, dtype=np.uint32)
TABLE = np.asarray([5, 2, 9, 1], np.int32)
GREEDY = Sampling(temperature=0)


SIZES = pytest.mark.parametrize("size", [1, 2, 3, 8])  # ranks: of one head each, and some that share one


def prefilled(settings: MemorySettings = SETTINGS, size: int = 1) -> MemoryRunner:
    runner = ranked_memory(settings, size)
    runner.execute(StepPlan((SequenceStep(0, PROMPT, 0, TABLE),)))
    return runner


def next_token(runner: MemoryRunner) -> int | None:
    return runner.execute(StepPlan((SequenceStep(0, PROMPT[:1], 40, TABLE, Draw(GREEDY, 0, 0)),))).tokens[0]


@SIZES
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7, seed=3)])
def test_a_run_produces_the_continuation_of_its_text(sampling: Sampling, size: int) -> None:
    runner = prefilled(size=size)
    tokens: list[int] = []
    step = SequenceStep(0, PROMPT[30:], 30, TABLE, Draw(sampling, 2, 0))
    for index in range(10):
        (token,) = runner.execute(StepPlan((step,))).tokens
        assert token is not None
        tokens.append(token)
        draw = Draw(sampling, 2, index + 1)
        step = SequenceStep(0, np.asarray([token], np.uint32), 40 + index, TABLE, draw)
    assert tokens == continuation(SETTINGS, PROMPT.tolist(), sampling, 2, 10)


@SIZES
@pytest.mark.parametrize("position", [0, 17, 39])
@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 1)])
def test_one_flipped_bit_anywhere_in_the_context_changes_the_next_token(
    position: int, layer: int, head: int, size: int
) -> None:
    right = next_token(prefilled())
    for bit in (0, 127):
        runner = prefilled(size=size)
        piece = Piece(layer, layer + 1, position, position + 1, head, head + 1)
        slot = bytearray(piece.num_bytes(8, "bfloat16"))
        runner.gather(piece, TABLE, memoryview(slot))
        slot[bit // 8] ^= 1 << bit % 8
        runner.scatter(piece, TABLE, memoryview(slot))
        assert next_token(runner) != right


@SIZES
def test_the_bytes_of_kv_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    piece = Piece(0, 2, 3, 40, 0, 2)
    frames = [bytearray(piece.num_bytes(8, "bfloat16")) for _ in range(2)]
    for frame, number in zip(frames, (1, size), strict=True):
        prefilled(size=number).gather(piece, TABLE, memoryview(frame))
    assert frames[0] == frames[1]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_that_was_not_told_a_step_changes_the_next_token(rank: int) -> None:
    """Rank 0 has the first KV head, the other two share the second."""
    deaf = False

    class Deaf(DirectChannel):
        def send(self, payload: bytes) -> None:
            if not deaf:
                super().send(payload)

    runner = ranked_memory(SETTINGS, 3, lambda number, load: (Deaf if number == rank else DirectChannel)(load))
    deaf = True
    runner.execute(StepPlan((SequenceStep(0, PROMPT, 0, TABLE),)))
    deaf = False
    assert (next_token(runner) == next_token(prefilled())) == (rank == 2), "the one that is read"


def test_kv_of_an_equal_token_behind_another_text_is_not_the_same() -> None:
    runner = MemoryRunner(SETTINGS)
    frames = []
    for first in (1, 2):
        tokens = np.asarray([first, 7, 7], np.uint32)
        runner.execute(StepPlan((SequenceStep(0, tokens, 0, TABLE),)))
        piece = Piece(0, 2, 1, 3, 0, 2)
        slot = bytearray(piece.num_bytes(8, "bfloat16"))
        runner.gather(piece, TABLE, memoryview(slot))
        frames.append(np.frombuffer(bytes(slot), np.uint8).reshape(2, 2, 2, 2, 16))
    assert not np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0][:, :, 0], frames[0][:, :, 1])


def test_a_missing_block_changes_the_next_token() -> None:
    runner = prefilled()
    right = next_token(runner)
    swapped = TABLE[[1, 0, 2, 3]]
    plan = StepPlan((SequenceStep(0, PROMPT[:1], 40, swapped, Draw(GREEDY, 0, 0)),))
    assert runner.execute(plan).tokens[0] != right


def test_models_of_different_names_do_not_pair() -> None:
    other = MemorySettings(num_blocks=16, vocab_size=50_000, model="other")
    assert other.kv_format.format_id != SETTINGS.kv_format.format_id
    assert next_token(prefilled(other)) != next_token(prefilled())


def test_steps_report_the_time_that_they_are_told_to_take() -> None:
    settings = MemorySettings(seconds_per_step=0.5, seconds_per_token=0.25)
    plan = StepPlan((SequenceStep(0, PROMPT, 0, TABLE),))
    assert MemoryRunner(settings).execute(plan).seconds == pytest.approx(0.5 + 0.25 * 40)


def test_the_twin_imports_no_torch() -> None:
    program = "import sys, kvferry.engine.memory.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
