"""Calls that a model makes of its own accord, to tools of which some are `strict`.

Any text may come until a call begins. Then it is a call of one of the tools, in the model's form, and its arguments
follow the schema where that tool is strict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kvferry.wire.sampling import Grammar
from kvferry_gateway.parsing import hermes, llama3, mistral
from kvferry_gateway.parsing.forms import MARKS, THOUGHT_MARKS, ToolForm
from kvferry_gateway.requests.tagged import Special, TaggedText, between
from kvferry_gateway.requests.tools import Tool, list_of, schemas_of_calls

ANY_ARGUMENTS: Final[dict[str, Any]] = {"type": "object"}


def grammar_of_own_calls(form: ToolForm, tools: Sequence[Tool], special: Special, *, parallel: bool) -> Grammar:
    text = TaggedText(special)
    match form:
        case "hermes":
            return text.grammar(between(_hermes(text, tools, parallel), _shown(text, form), at_most_one=not parallel))
        case "mistral":
            return text.grammar(between(_mistral(text, tools, parallel), _shown(text, form), at_most_one=not parallel))
        case "llama3_json":
            return text.grammar(_llama3(text, tools, parallel))


def _hermes(text: TaggedText, tools: Sequence[Tool], parallel: bool) -> str:
    """One call between the marks, or a list of them, as some models write it."""
    calls, definitions = schemas_of_calls(tools, _arguments)
    some = text.schema({"anyOf": [*calls, list_of(calls, parallel=parallel)], "$defs": definitions})
    return text.rule("tag", f"{text.up_to(hermes.OPEN)} SPACE {some} SPACE {text.literal(hermes.CLOSE)}")


def _mistral(text: TaggedText, tools: Sequence[Tool], parallel: bool) -> str:
    """A list of calls, or the name of a tool and its arguments, with or without the marks of later tokenizers."""
    calls, definitions = schemas_of_calls(tools, _arguments)
    some = text.schema({**list_of(calls, parallel=parallel), "$defs": definitions})
    marks = f"({text.literal(mistral.CALL_ID)} /[^\\[{{]{{1,64}}/)? {text.literal(mistral.ARGS)}"
    named = (f"{text.literal(tool.function.name)} ({marks})? SPACE {text.schema(_arguments(tool))}" for tool in tools)
    return text.rule("tag", f"{text.up_to(mistral.MARK)} SPACE ({' | '.join((some, *named))})")


def _llama3(text: TaggedText, tools: Sequence[Tool], parallel: bool) -> str:
    """What begins like a call is one, and so is what follows the tag."""
    calls, definitions = schemas_of_calls(tools, _arguments, key="parameters")
    call = text.rule("call", text.schema({"anyOf": calls, "$defs": definitions}))
    calls_rule = text.rule("calls", f"SPACE {call} " + (f'(SPACE ";" SPACE {call})* SPACE' if parallel else "SPACE"))
    other = r"[ \t\r\n]*[^ \t\r\n{](.|\n)*"
    text.rule("OTHER", f"/{other}/")
    tag = text.literal(llama3.TAG)
    lead = text.up_to(llama3.TAG, f"({other})?")
    again = f" ({tag} {calls_rule})*" if parallel else ""
    return f"{calls_rule} | OTHER | SPACE | {lead} {calls_rule}{again}"


def _shown(text: TaggedText, form: ToolForm) -> str:
    """What may stand in the text although it is no text to a grammar."""
    return text.shown((*THOUGHT_MARKS, *MARKS[form][1:]))


def _arguments(tool: Tool) -> dict[str, Any]:
    return tool.schema_of_arguments if tool.function.strict else ANY_ARGUMENTS
