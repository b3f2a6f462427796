"""A prompt's log-probabilities at the gateway: collected from pieces, and told in both forms."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from scripted_worker import tokens_of, write_model
from virtual_loop import VirtualLoop

from kvferry.text.detokenizer import TokenTexts
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.logprobs import PromptLogprobs
from kvferry.wire.sampling import MAX_LOGPROBS, Scoring
from kvferry_gateway.answers.prompt_logprobs import TOKENS_PER_TURN, encoded_columns, encoded_echo, encoded_entries
from kvferry_gateway.answers.prompt_scores import PromptScores

NUM_TOP = 3
T = TypeVar("T")


def whole(num_tokens: int, seed: int = 0, num_top: int = NUM_TOP) -> PromptLogprobs:
    """Of all tokens but the first."""
    chance = np.random.default_rng(seed)
    shape = num_tokens - 1, num_top
    return PromptLogprobs(
        1,
        chance.integers(1, 99, shape[0]).astype(np.uint32),
        np.array([chance.permutation(257)[:num_top] for _ in range(shape[0])], np.uint32).reshape(shape),
        -chance.random((shape[0], 1 + num_top), np.float32),
    )


def scores_of(found: PromptLogprobs) -> PromptScores:
    scores = PromptScores(found.end, found.top_tokens.shape[1])
    assert scores.take(found)
    return scores


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop()) as runner:
        return runner.run(coroutine)


@pytest.mark.parametrize("seed", range(30))
def test_pieces_may_come_doubled_and_in_any_order(seed: int) -> None:
    chance = random.Random(seed)
    found = whole(60, seed)
    cuts = sorted({1, 60, *(chance.randrange(2, 60) for _ in range(6))})
    pieces = [found.part(start, end) for start, end in itertools.pairwise(cuts)]
    pieces += [found.part(start, chance.randint(start + 1, 60)) for start in chance.sample(range(1, 59), 4)]
    chance.shuffle(pieces)
    scores, known = PromptScores(60, NUM_TOP), {0}
    for piece in pieces:
        assert not scores.complete.is_set()
        assert scores.lacking == Scoring(NUM_TOP, min(set(range(60)) - known))
        assert scores.take(piece)
        known |= set(range(piece.start, piece.end))
        if len(known) == 60:
            break
    assert scores.complete.is_set()
    assert scores.lacking is None
    assert np.array_equal(scores.ranks[1:], found.ranks)
    assert np.array_equal(scores.top_tokens[1:], found.top_tokens)
    assert np.array_equal(scores.logprobs[1:], found.logprobs)


def test_pieces_of_other_prompts_or_of_another_width_are_not_taken() -> None:
    scores = PromptScores(10, NUM_TOP)
    assert not scores.take(whole(11))
    assert not scores.take(whole(10, num_top=NUM_TOP + 1))
    assert scores.lacking == Scoring(NUM_TOP)


def test_a_prompt_of_one_token_has_nothing_to_ask_for() -> None:
    assert PromptScores(1, 0).complete.is_set()


@pytest.fixture
def texts(tmp_path: Path) -> TokenTexts:
    return TokenTexts(Tokenizer(write_model(tmp_path / "tiny", special=["<|begin|>"])))


BEGIN = 257  # the special token


def test_both_forms_are_json_and_say_the_same(texts: TokenTexts) -> None:
    prompt = 'Grüße\n"und" 😀 mehr als in eine Runde passt'
    tokens = np.asarray(tokens_of(prompt), np.uint32)
    scores = scores_of(whole(len(tokens)))
    entries = json.loads(run(encoded_entries(tokens, scores, 2, texts)))
    echoed = run(encoded_echo(tokens, scores, 2, texts, prompt))
    columns = json.loads(encoded_columns(echoed, (), texts))
    assert len(entries) == len(tokens) == len(columns["tokens"]) == len(columns["text_offset"])
    assert entries[0] is columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
    for place in range(1, len(tokens)):
        token, best = str(tokens[place]), scores.top_tokens[place][:2].tolist()
        own = entries[place][token]
        assert list(entries[place]) == list(dict.fromkeys([token, *map(str, best)]))
        assert own["rank"] == scores.ranks[place]
        assert own["logprob"] == columns["token_logprobs"][place] == pytest.approx(scores.logprobs[place, 0])
        assert columns["top_logprobs"][place][columns["tokens"][place]] is not None
    assert [columns["text_offset"][place] for place in (0, 1, 2, 4)] == [0, 1, 2, 3], "ü is two tokens"
    assert columns["text_offset"][-1] == len(prompt) - 1


def test_offsets_count_only_what_the_echo_has(texts: TokenTexts) -> None:
    """A tokenizer puts its own special tokens before a text; a text may hold some, too."""
    tokens = np.asarray([BEGIN, *tokens_of("ab"), BEGIN, *tokens_of("c")], np.uint32)
    scores = scores_of(whole(len(tokens)))

    def offsets(echo: str) -> list[int]:
        found: list[int] = json.loads(b"[" + run(encoded_echo(tokens, scores, 0, texts, echo)).text_offset + b"]")
        return found

    assert offsets("abc") == [0, 0, 1, 2, 2]
    assert offsets("ab<|begin|>c") == [0, 0, 1, 2, 11]
    assert offsets("<|begin|>ab<|begin|>c") == [0, 9, 10, 11, 20]


def test_what_json_can_not_say_is_told_by_its_stand_in(texts: TokenTexts) -> None:
    found = whole(3)
    found.logprobs[0], found.logprobs[1] = -np.inf, np.nan
    tokens = np.asarray([1, 2, 3], np.uint32)
    for told in json.loads(run(encoded_entries(tokens, scores_of(found), NUM_TOP, texts)))[1:]:
        assert {row["logprob"] for row in told.values()} == {-9999.0}


def test_a_long_prompt_is_told_a_little_in_each_turn_of_the_loop(texts: TokenTexts) -> None:
    size = 40 * TOKENS_PER_TURN
    tokens = np.asarray(np.arange(size) % 257, np.uint32)
    scores = scores_of(whole(size, num_top=MAX_LOGPROBS))

    async def turns_of(telling: Coroutine[Any, Any, Any]) -> int:
        task, turns = asyncio.ensure_future(telling), 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        await task
        return turns

    assert run(turns_of(encoded_entries(tokens, scores, MAX_LOGPROBS, texts))) >= 40
    assert run(turns_of(encoded_echo(tokens, scores, MAX_LOGPROBS, texts, ""))) >= 40
