"""Where a choice stands in its grammar: replay, the end, another thread, and what does not follow."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from scripted_worker import EOS, tokens_of
from unit.grammar.conftest import VOCAB_SIZE

from kvferry.grammar.compiler import GrammarCompiler
from kvferry.grammar.mask import GrammarMask
from kvferry.wire.sampling import Grammar

NOTHING = np.empty(0, np.uint32)
OBJECT = Grammar("json", '{"type": "object"}')
GRAMMARS = [
    OBJECT,
    Grammar("regex", r"(ab|cd){2,40}!"),
    Grammar("choice", '["left", "right", "straight on"]'),
    Grammar("grammar", 'root ::= "(" root ")" | "x"'),
]


def allowed(mask: GrammarMask) -> set[int]:
    words = mask.words()
    assert words is not None, mask.fault
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def generated(text: str) -> np.ndarray:
    return np.asarray(tokens_of(text), np.uint32)


def test_only_what_the_grammar_goes_on_with_may_be_drawn(compiler: GrammarCompiler) -> None:
    mask = compiler.follow(Grammar("regex", "a[bc]+"), NOTHING)
    assert allowed(mask) == set(tokens_of("a"))
    mask.advance(generated("a"))
    assert allowed(mask) == set(tokens_of("bc"))
    mask.advance(generated("abc"))
    assert allowed(mask) == {*tokens_of("bc"), EOS}, "it may end here, or go on"


def test_a_complete_text_can_only_end_and_with_any_token_that_ends_one(tokenizer_path: Path) -> None:
    compiler = GrammarCompiler(tokenizer_path, VOCAB_SIZE, frozenset({EOS, 256}))
    assert allowed(compiler.follow(OBJECT, generated("{}"))) == {EOS, 256}


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_a_replay_stands_where_the_steps_stood(compiler: GrammarCompiler, grammar: Grammar) -> None:
    rng = np.random.default_rng(1)
    stepping, tokens = compiler.follow(grammar, NOTHING), []
    for _ in range(40):
        may = allowed(stepping)
        assert may
        assert max(may) <= 256, "a logit without a token"
        assert allowed(compiler.follow(grammar, np.asarray(tokens, np.uint32))) == may
        token = int(rng.choice(sorted(may)))
        if token == EOS:
            break
        tokens.append(token)
        stepping.advance(np.asarray(tokens, np.uint32))


def test_masks_of_one_grammar_do_not_disturb_each_other(compiler: GrammarCompiler) -> None:
    first, second = (compiler.follow(Grammar("regex", "abc|axy"), NOTHING) for _ in range(2))
    first.advance(generated("ab"))
    second.advance(generated("ax"))
    assert (allowed(first), allowed(second)) == (set(tokens_of("c")), set(tokens_of("y")))


def test_a_token_that_does_not_follow_is_a_fault_for_good(compiler: GrammarCompiler) -> None:
    mask = compiler.follow(Grammar("regex", "abc"), NOTHING)
    mask.advance(generated("ax"))
    fault = mask.fault
    assert fault
    assert mask.words() is None
    mask.advance(generated("ab"))
    assert mask.fault == fault


def test_a_fault_does_not_tell_what_was_generated(compiler: GrammarCompiler) -> None:
    mask = compiler.follow(Grammar("regex", "(secret)+"), generated("secretsecret"))
    mask.advance(generated("secretsecret?"))
    assert mask.fault
    assert "secret" not in mask.fault


def test_a_grammar_that_begins_later_leaves_what_comes_before_free(compiler: GrammarCompiler) -> None:
    after = tokens_of("|")[0]
    mask = compiler.follow(Grammar("regex", "ab", after), generated("I think"))
    assert mask.words() is None
    assert mask.fault is None
    mask.advance(generated("I think so.|"))
    assert allowed(mask) == set(tokens_of("a"))
    assert allowed(compiler.follow(Grammar("regex", "a|b", after), generated("x||"[:2]))) == set(tokens_of("ab"))
    taken_over = compiler.follow(Grammar("regex", "ab", after), generated("I think so.|a"))
    mask.advance(generated("I think so.|a"))
    assert allowed(mask) == allowed(taken_over) == set(tokens_of("b"))


def test_a_mask_in_the_making_is_waited_for(compiler: GrammarCompiler) -> None:
    mask = compiler.follow(Grammar("regex", "ab"), NOTHING)
    found: list[set[int]] = []
    mask.begin()
    waiting = threading.Thread(target=lambda: found.append(allowed(mask)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive(), "it took the mask of the draw before"
    mask.advance(generated("a"))
    waiting.join()
    assert found == [set(tokens_of("b"))]


def test_a_step_never_waits_for_a_mask_that_failed(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = compiler.follow(OBJECT, NOTHING)
    mask.begin()
    monkeypatch.setattr(GrammarMask, "_take", lambda self, tokens: 1 / 0)
    mask.advance(generated("{"))
    assert mask.words() is None
    assert mask.fault == "ZeroDivisionError: division by zero"
