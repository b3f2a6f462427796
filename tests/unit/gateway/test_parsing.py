"""What a model's text means: the forms of tool calls and thoughts, whatever pieces the text comes in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvferry_gateway.parsing.forced import NamedParser, RequiredParser
from kvferry_gateway.parsing.forms import Reading, thoughts_of, tool_form_of
from kvferry_gateway.parsing.hermes import HermesParser
from kvferry_gateway.parsing.json_value import JsonValue
from kvferry_gateway.parsing.llama3 import Llama3Parser
from kvferry_gateway.parsing.mistral import MistralParser
from kvferry_gateway.parsing.parser import OutputParser
from kvferry_gateway.parsing.parts import CallArguments, CallStart, Content, Message, Part, Reasoning
from kvferry_gateway.parsing.reasoning import ReasoningParser

TOOLS = ("get_weather", "f")
PARSERS: dict[str, Callable[[], OutputParser]] = {
    "hermes": HermesParser,
    "hermes, one call": lambda: HermesParser(max_calls=1),
    "llama3": lambda: Llama3Parser(TOOLS),
    "mistral": MistralParser,
    "required": RequiredParser,
    "named": lambda: NamedParser("f"),
    "thoughts": lambda: ReasoningParser(None, is_open=True),
    "thoughts, then hermes": lambda: ReasoningParser(HermesParser(), is_open=False),
}
CALL = '{"name": "get_weather", "arguments": {"city": "Paris \\"}{\\" \u00e9", "days": [1, {"a": null}]}}'
ARGUMENTS = json.loads(CALL)["arguments"]
CALL2 = '{"name": "f", "arguments": {}}'


def parse(make: Callable[[], OutputParser], pieces: list[str]) -> list[Part]:
    parser = make()
    return [part for piece in pieces for part in parser.push(piece)] + parser.finish()


def merged(parts: list[Part]) -> list[Part]:
    """Pieces of one text as one."""
    made: list[Part] = []
    for part in parts:
        match made[-1:], part:
            case [Content(before)], Content(text):
                made[-1] = Content(before + text)
            case [Reasoning(before)], Reasoning(text):
                made[-1] = Reasoning(before + text)
            case [CallArguments(index, before)], CallArguments(other, text) if index == other:
                made[-1] = CallArguments(index, before + text)
            case _:
                made.append(part)
    return made


def message(name: str, text: str) -> Message:
    return Message.of(parse(PARSERS[name], [text]))


def calls(found: Message) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in found.calls]


# Texts that look like what the parsers look for.
fragments = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[TOOL", "[ARGS]", "[CALL_ID]x1", "<|python_tag|>",
     "<think>", "</think>", "\n", " ", ";", ",", "[", "]", "{", "}", '"', "\\", ":", CALL, CALL2, CALL[:30], CALL[30:],
     '"name"',
     '"arguments"', '"parameters"', '"f"', "f", "word", "\u00e9", "null", "1", '{"a": 1}', '"{\\"a\\": 1}"']
)  # fmt: skip
texts = st.one_of(st.lists(fragments, max_size=14).map("".join), st.text(max_size=40))


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=50)
@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=12))
@example(text="<tool_call>\n" + CALL + "\n</tool_call>", cuts=list(range(200)))
@example(text="[TOOL_CALLS]f[CALL_ID]abc[ARGS]" + '{"a": 1}', cuts=list(range(200)))
def test_any_split_of_a_text_gives_the_same_parts(name: str, text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    whole = merged(parse(PARSERS[name], [text]))
    assert merged(parse(PARSERS[name], pieces)) == whole
    assert merged(parse(PARSERS[name], list(text))) == whole


@pytest.mark.parametrize("name", PARSERS)
@given(text=texts)
def test_every_call_is_started_before_its_arguments_and_numbered_in_order(name: str, text: str) -> None:
    started = 0
    for part in parse(PARSERS[name], list(text)):
        if isinstance(part, CallStart):
            assert part.index == started
            started += 1
        elif isinstance(part, CallArguments):
            assert part.index == started - 1
            assert part.text
        else:
            assert part.text, "an empty piece"


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama3", "required", "thoughts, then hermes"])
@given(text=st.text(alphabet=st.characters(exclude_characters="<[{"), min_size=1))
def test_a_text_without_a_call_is_content_to_its_last_character(name: str, text: str) -> None:
    assert message(name, text) == Message(content=text)


@pytest.mark.parametrize(
    "text",
    ["<tool_call>", "<tool_call>\nnone of that", "<tool_call>{}", '<tool_call>{"name": 3}</tool_call>', "a <tool_cal",
     '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"name": "a b"}', "<tool_call>[]</tool_call>",
     '<tool_call>{"name": "f"', '<tool_call>{"name" "f"}'],
)  # fmt: skip
def test_what_only_begins_like_a_call_is_shown_as_it_is(text: str) -> None:
    assert message("hermes", text) == Message(content=text)


def test_hermes_calls_with_text_around_them() -> None:
    found = message("hermes", f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL2}</tool_call>\n")
    assert found.content == "Let me see."
    assert calls(found) == [("get_weather", ARGUMENTS), ("f", {})]
    assert found.calls[0].arguments in CALL, "as the model wrote it"


def test_a_list_of_calls_between_one_pair_of_tags() -> None:
    found = message("hermes", f"<tool_call>[{CALL}, {CALL2}]</tool_call>Done.")
    assert (found.content, calls(found)) == ("Done.", [("get_weather", ARGUMENTS), ("f", {})])


@pytest.mark.parametrize(
    "call",
    ['{"arguments": {"a": 1}, "name": "f"}', '{"id": "x", "name": "f", "arguments": {"a": 1}, "type": ["function"]}',
     '{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": "f", "parameters": {"a": 1}}}'],
)  # fmt: skip
def test_calls_in_other_orders_and_spellings(call: str) -> None:
    assert calls(message("hermes", f"<tool_call>{call}</tool_call>")) == [("f", {"a": 1})]


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert calls(message("hermes", '<tool_call>{"name": "f"}</tool_call>')) == [("f", {})]
    assert calls(message("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>')) == [("f", {})]


def test_arguments_come_as_the_model_writes_them() -> None:
    parser = HermesParser()
    assert parser.push('<tool_call>{"name": "f", "argum') == []
    assert parser.push('ents": {"city": "Pa') == [CallStart(0, "f"), CallArguments(0, '{"city": "Pa')]
    assert parser.push('ris"') == [CallArguments(0, 'ris"')]
    assert parser.push("}}</tool_call>") == [CallArguments(0, "}")]
    assert parser.finish() == []


def test_arguments_that_end_too_soon_are_told_as_far_as_they_came() -> None:
    found = message("hermes", '<tool_call>{"name": "f", "arguments": {"city": "Pa')
    assert [(call.name, call.arguments) for call in found.calls] == [("f", '{"city": "Pa')]


def test_only_the_first_call_is_told_where_calls_are_not_parallel() -> None:
    found = message("hermes, one call", f"<tool_call>{CALL}</tool_call><tool_call>{CALL2}</tool_call>")
    assert calls(found) == [("get_weather", ARGUMENTS)]


def test_llama3_calls() -> None:
    text = CALL.replace("arguments", "parameters")
    assert calls(message("llama3", text)) == [("get_weather", ARGUMENTS)]
    assert calls(message("llama3", f"<|python_tag|>{text}; {CALL2}")) == [("get_weather", ARGUMENTS), ("f", {})]
    assert calls(message("llama3", f"\n{text}")) == [("get_weather", ARGUMENTS)]


@pytest.mark.parametrize("text", ['{"name": "Ada", "parameters": {}}', '{"answer": 42}', "{", ' {"name": "f" oh'])
def test_an_answer_in_json_is_no_llama3_call(text: str) -> None:
    assert message("llama3", text) == Message(content=text)


@pytest.mark.parametrize(
    "text",
    [f"[TOOL_CALLS] [{CALL}, {CALL2}]", f"[TOOL_CALLS]get_weather{json.dumps(ARGUMENTS)}[TOOL_CALLS]f{{}}",
     f"[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{json.dumps(ARGUMENTS)}[TOOL_CALLS]f[ARGS]{{}}"],
)  # fmt: skip
def test_mistral_calls(text: str) -> None:
    found = message("mistral", "Well. " + text)
    assert (found.content, calls(found)) == ("Well.", [("get_weather", ARGUMENTS), ("f", {})])


def test_calls_that_a_grammar_made() -> None:
    assert calls(message("required", f"[{CALL}, {CALL2}]")) == [("get_weather", ARGUMENTS), ("f", {})]
    assert calls(message("named", '{"a": 1}')) == [("f", {"a": 1})]


def test_thoughts_stand_before_the_answer() -> None:
    opened = message("thoughts", "\nLet me think.\n\nWell.\n</think>\n\nParis.\n")
    assert opened == Message(content="Paris.\n", reasoning="Let me think.\n\nWell.")
    both = message("thoughts, then hermes", f"<think>\nHm <tool_call>\n</think>\n\nSo:\n<tool_call>{CALL}</tool_call>")
    assert (both.reasoning, both.content, calls(both)) == ("Hm <tool_call>", "So:", [("get_weather", ARGUMENTS)])
    assert message("thoughts, then hermes", "Paris. <think>") == Message(content="Paris. <think>")
    assert message("thoughts", "never done") == Message(reasoning="never done")


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) |
       st.dictionaries(st.text(), inner)), ascii_only=st.booleans())  # fmt: skip
def test_a_json_value_ends_where_it_ends(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    for pieces in ([text + ', "next"'], [*text, ","]):
        scan, done = JsonValue(), 0
        for piece in pieces:
            if (end := scan.push(piece)) is not None:
                done += end
                break
            done += len(piece)
        assert done == len(text)


def test_forms_are_told_by_the_template() -> None:
    assert tool_form_of("{% for t in tools %}[TOOL_CALLS]") == "mistral"
    assert tool_form_of("{{ tools }}<tool_call>") == "hermes"
    assert tool_form_of('<|start_header_id|>{"name": , "parameters": }') == "llama3_json"
    assert tool_form_of("<|im_start|>") is None
    assert [thoughts_of(text) for text in ("a<think>\n", "a<think>\n\n</think>\n\n", "a")] == ["open", "none", "maybe"]
    assert Reading().parser() is None
