"""What is compiled and what is refused: kinds, bounds, nothing left out in silence."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scripted_worker import EOS, tokens_of
from unit.grammar.conftest import VOCAB_SIZE

from kvferry.grammar.compiler import (
    MAX_COMPILED,
    MAX_LARK_CHARS,
    MAX_PATTERN_CHARS,
    GrammarCompiler,
    GrammarError,
)
from kvferry.wire.sampling import Grammar


def accepts(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Whether the whole text follows the grammar."""
    mask = compiler.follow(grammar, np.empty(0, np.uint32))
    tokens = np.asarray([*tokens_of(text), EOS], np.uint32)
    for count, token in enumerate(tokens.tolist()):
        mask.advance(tokens[:count])
        words = mask.words()
        if words is None or not words[token // 32] >> token % 32 & 1:
            return False
    return True


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (Grammar("json", '{"type": "integer"}'), ["1", "-20"], ["1.5", '"1"', " 1", "01"]),
        (Grammar("regex", r"\d{3}-[a-z]+"), ["123-ab"], ["12-ab", "123-", "123-ab "]),
        (Grammar("choice", json.dumps(["é", 'a "b"\n', "a"])), ["é", 'a "b"\n', "a"], ["b", "e", ""]),
        (Grammar("grammar", 'start: "a" item+\nitem: /[0-9]/ | "(" item ")"'), ["a1(2)((3))"], ["a", "a(1"]),
        (Grammar("grammar", 'root ::= "a" item+\nitem ::= [0-9] | "(" item ")"'), ["a1(2)((3))"], ["a", "a(1"]),
        (Grammar("grammar", 'start: "call:" args\nargs: %json {"type": "object"}'), ['call:{"a": 1}'], ["call:1"]),
    ],
    ids=["json", "regex", "choice", "lark", "gbnf", "json in lark"],
)
def test_each_kind_takes_what_it_should_and_nothing_else(
    compiler: GrammarCompiler, grammar: Grammar, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not accepts(compiler, grammar, text)] == []
    assert [text for text in wrong if accepts(compiler, grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json", "{"), "property name"),
        (Grammar("json", "[1]"), "object"),
        (Grammar("json", '{"type": "strin"}'), "strin"),
        (Grammar("json", '{"not": {}}'), "not"),
        (Grammar("json", '{"not": {}, "x-guidance": {"lenient": true}}'), "not"),
        (Grammar("json", '{"type": "string", "format": "unheard-of"}'), "unheard-of"),
        (Grammar("json", '{"$ref": "https://example.org/schema"}'), "example.org"),
        (Grammar("json", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'), "no text can follow"),
        (Grammar("json", '{"a":' * 3000 + "1" + "}" * 3000), "recursion"),
        (Grammar("json", json.dumps({"pattern": "a" * (MAX_PATTERN_CHARS + 1)})), "longer than"),
        (Grammar("json", json.dumps({"items": [{"patternProperties": {"a" * 5000: {}}}]})), "longer than"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", r"[^\x00-\U0010ffff]"), "no text can follow"),
        (Grammar("regex", "a" * (MAX_PATTERN_CHARS + 1)), "longer than"),
        (Grammar("choice", "[]"), "list of texts"),
        (Grammar("choice", "[1]"), "list of texts"),
        (Grammar("choice", "{"), "property name"),
        (Grammar("grammar", "start: ("), "Expected"),
        (Grammar("grammar", "anything"), "GBNF"),
        (Grammar("grammar", "start: <no_such_token>"), "unknown special token"),
        (Grammar("grammar", "start: /" + "a?" * MAX_PATTERN_CHARS + "/"), "longer than"),
        (Grammar("grammar", "start: " + '"a" ' * MAX_LARK_CHARS), "longer than"),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else None,
)
def test_what_no_text_or_no_worker_could_follow_is_refused_with_a_reason(
    compiler: GrammarCompiler, grammar: Grammar, reason: str
) -> None:
    for call in (lambda: compiler.check(grammar), lambda: compiler.follow(grammar, np.empty(0, np.uint32))):
        with pytest.raises(GrammarError) as caught:
            call()
        assert reason in caught.value.reason
        assert len(caught.value.reason) <= 300


def test_a_check_looks_at_a_grammar_that_begins_later_too(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="no text can follow"):
        compiler.check(Grammar("regex", r"[^\x00-\U0010ffff]", after=5))


def test_white_space_between_the_parts_of_json_is_free_but_has_an_end(compiler: GrammarCompiler) -> None:
    grammar = Grammar("json", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
    assert accepts(compiler, grammar, '{"a":1}')
    assert accepts(compiler, grammar, '{\n    "a" : 1\n}')
    assert accepts(compiler, grammar, "{" + " " * 32 + '"a":1}')
    assert not accepts(compiler, grammar, "{" + " " * 33 + '"a":1}')


def test_a_fixed_number_of_compiled_grammars_is_kept(tokenizer_path: Path) -> None:
    compiler = GrammarCompiler(tokenizer_path, VOCAB_SIZE, frozenset({EOS}))
    for number in range(2 * MAX_COMPILED):
        compiler.check(Grammar("regex", f"a{{{number + 1}}}"))
    assert len(compiler._compiled) == MAX_COMPILED


def test_a_model_without_an_end_or_with_no_tokenizer_that_is_understood_follows_no_grammar(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    grammar = Grammar("regex", "a")
    with pytest.raises(GrammarError, match="ends a text"):
        GrammarCompiler(tokenizer_path, VOCAB_SIZE, frozenset()).check(grammar)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("tokenizer.json", "missing.json"):
        with pytest.raises(GrammarError, match="tokenizer"):
            GrammarCompiler(tmp_path / name, VOCAB_SIZE, frozenset({EOS})).check(grammar)


def test_compiling_and_replaying_leave_the_event_loop_its_turns(compiler: GrammarCompiler) -> None:
    """A thread that kept the GIL would keep the heartbeats, and the worker would be judged gone."""
    parts = [{"properties": {f"k{i}_{j}": {"type": "string"} for j in range(20)}} for i in range(150)]
    large = Grammar("json", json.dumps({"anyOf": [{"type": "object", **part} for part in parts]}))
    long = np.asarray(tokens_of("ab" * 40_000), np.uint32)
    for call in (lambda: compiler.check(large), lambda: compiler.follow(Grammar("regex", "[ab]*"), long)):
        working = threading.Thread(target=call)
        working.start()
        turns = 0
        while working.is_alive():
            time.sleep(0.001)
            turns += 1
        assert turns >= 5
