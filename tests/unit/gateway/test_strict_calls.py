"""Free text with calls in it: what may be drawn where tools are `strict` and the model calls them of its own accord.

Texts are followed through the real compiler, on tokenizers on which the marks are plain text, or special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_worker import EOS, write_model

from kvferry.grammar.compiler import GrammarCompiler, GrammarError
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.sampling import Grammar
from kvferry_gateway.errors import ApiError
from kvferry_gateway.parsing.forms import MARKS, THOUGHT_MARKS, ToolForm
from kvferry_gateway.requests.strict_calls import grammar_of_own_calls
from kvferry_gateway.requests.structured import StructuredOutputs, constraint_of
from kvferry_gateway.requests.tools import Tool

LEVEL = {
    "type": "object",
    "properties": {"level": {"enum": ["low", "high"]}},
    "required": ["level"],
    "additionalProperties": False,
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "set", "strict": True, "parameters": LEVEL}}),
    Tool.model_validate({"type": "function", "function": {"name": "stop", "parameters": LEVEL}}),
]
ALL_MARKS = (*THOUGHT_MARKS, *(mark for marks in MARKS.values() for mark in marks))
# Whether the text is at an end there, where it is allowed at all.
Verdict = bool | None
Judge = Callable[[Grammar, str], Verdict]


class Vocabulary:
    """A tokenizer, with the marks as special tokens or without."""

    def __init__(self, folder: Path, marks: tuple[str, ...]) -> None:
        model = write_model(folder, special=marks)
        self._tokenizer = Tokenizer(model)
        self._compiler = GrammarCompiler(model.tokenizer_path, model.vocab_size, frozenset({EOS}))
        backend = self._tokenizer.backend
        self.special = {backend.id_to_token(token) or "": token for token in self._tokenizer.special_token_ids}

    def judge(self, grammar: Grammar, text: str) -> Verdict:
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        try:
            words = self._compiler.follow(grammar, np.asarray(tokens, np.uint32)).words()
        except GrammarError:
            return None
        assert words is not None
        return bool(words[EOS // 32] >> EOS % 32 & 1)


@pytest.fixture(scope="module", params=[(), ALL_MARKS], ids=["marks are text", "marks are special"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("model"), request.param)


def call(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


SET, WRONG, STOP = call("set", {"level": "low"}), call("set", {"level": "mid"}), call("stop", {"any": [1, None]})
HERMES = "<tool_call>\n{}\n</tool_call>"
LLAMA = [text.replace('"arguments"', '"parameters"') for text in (SET, WRONG, STOP)]
FORMS: dict[ToolForm, dict[str, tuple[Verdict, Verdict]]] = {  # text -> verdicts with parallel calls, and without
    "hermes": {
        "": (True, True),
        "A { brace, <tool_cal": (True, True),
        "<think>Call it?</think> No.": (True, True),
        "hm <tool_call>": (False, False),
        "<tool_call>no": (None, None),
        f"hm {HERMES.replace('{}', SET)}": (True, True),
        HERMES.replace("{}", STOP): (True, True),
        HERMES.replace("{}", WRONG): (None, None),
        HERMES.replace("{}", call("other", {})): (None, None),
        HERMES.replace("{}", f"[{SET}]"): (True, True),
        HERMES.replace("{}", f"[{SET}, {STOP}]"): (True, None),
        2 * HERMES.replace("{}", SET): (True, None),
        HERMES.replace("{}", SET) + " done": (True, None),
        HERMES.replace("{}", SET) + HERMES.replace("{}", WRONG): (None, None),
    },
    "mistral": {
        "Nothing.": (True, True),
        f"[TOOL_CALLS] [{SET}]": (True, True),
        f"[TOOL_CALLS][{SET}, {STOP}]": (True, None),
        f"[TOOL_CALLS][{WRONG}]": (None, None),
        '[TOOL_CALLS]set{"level": "low"}': (True, True),
        '[TOOL_CALLS]set[ARGS]{"level": "high"}': (True, True),
        '[TOOL_CALLS]set[CALL_ID]ab12[ARGS]{"level": "high"}': (True, True),
        '[TOOL_CALLS]set{"level": "mid"}': (None, None),
        "[TOOL_CALLS]other{}": (None, None),
        '[TOOL_CALLS]stop{"a": 1}[TOOL_CALLS]set{"level": "low"}': (True, None),
    },
    "llama3_json": {
        "Plain { text": (True, True),
        LLAMA[0]: (True, True),
        f"  {LLAMA[2]}": (True, True),
        LLAMA[1]: (None, None),
        '{"an": "answer"}': (None, None),
        f"{LLAMA[0]}; {LLAMA[2]}": (True, None),
        f"<|python_tag|>{LLAMA[0]}": (True, True),
        f"Well: <|python_tag|>{LLAMA[0]}": (True, True),
        f"Well: <|python_tag|>{LLAMA[1]}": (None, None),
        "Well: <|python_tag|>print()": (None, None),
    },
}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_begins_is_one_of_a_tool_and_valid_where_that_is_strict(
    vocabulary: Vocabulary, form: ToolForm, parallel: bool
) -> None:
    grammar = grammar_of_own_calls(form, TOOLS, vocabulary.special, parallel=parallel)
    found = {text: vocabulary.judge(grammar, text) for text in FORMS[form]}
    assert found == {text: verdicts[0 if parallel else 1] for text, verdicts in FORMS[form].items()}


def tags(*, begin: str = "<f=a>", **fields: Any) -> dict[str, Any]:
    tag = {"begin": begin, "content": {"type": "json_schema", "json_schema": LEVEL}, "end": "</f>"}
    form = {"type": "triggered_tags", "triggers": ["<f="], "tags": [tag, {**tag, "begin": "<f=b>"}], **fields}
    return {"type": "structural_tag", "format": form}


def grammar_of(vocabulary: Vocabulary, tag: Any) -> Grammar:
    outputs = StructuredOutputs.model_validate({"structural_tag": tag})
    constraint = constraint_of(None, outputs, vocabulary.special)
    assert constraint is not None
    return constraint.grammar


OLDER = {
    "structures": [{"begin": f"<f={name}>", "schema": LEVEL, "end": "</f>"} for name in "ab"], "triggers": ["<f="],
}  # fmt: skip
ONE = '<f=a>{"level": "low"}</f>'


@pytest.mark.parametrize(
    ("tag", "verdicts"),
    [
        (OLDER, (True, True, True, None)),
        (json.dumps(OLDER), (True, True, True, None)),
        (tags(), (True, True, True, None)),
        (tags(at_least_one=True), (False, True, True, None)),
        (tags(stop_after_first=True), (True, True, None, None)),
    ],
    ids=["older", "as text", "newer", "at least one", "stop after first"],
)
def test_a_structural_tag_holds_behind_its_trigger(
    vocabulary: Vocabulary, tag: Any, verdicts: tuple[Verdict, ...]
) -> None:
    grammar = grammar_of(vocabulary, tag)
    texts = ("no tag", f"x {ONE}", f"{ONE} and {ONE.replace('=a', '=b')}", "<f=c>")
    assert tuple(vocabulary.judge(grammar, text) for text in texts) == verdicts


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        (tags(begin="<g=a>"), "no trigger begins"),
        ({"type": "structural_tag", "format": {"type": "any_text"}}, "structural_tag.format.type"),
        (tags(excludes=["a"]), "structural_tag.format.excludes"),
        ({"structures": []}, "structural_tag.structures"),
        ("{", "not valid JSON"),
    ],
)
def test_what_a_structural_tag_does_not_have_is_refused_by_name(vocabulary: Vocabulary, tag: Any, named: str) -> None:
    with pytest.raises(ApiError) as caught:
        grammar_of(vocabulary, tag)
    assert caught.value.status == 400
    assert named in caught.value.message
    assert caught.value.param == "structured_outputs.structural_tag"
