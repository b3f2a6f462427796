"""How the answers of one model are read, and which grammar a demanded tool call has."""

from __future__ import annotations

import json
from typing import Final

from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.sampling import MAX_GRAMMAR_CHARS, Grammar
from kvferry_gateway.errors import bad_request
from kvferry_gateway.parsing.forms import (
    MARKS,
    PLAIN_TEXT,
    THOUGHT_MARKS,
    Reading,
    ReasoningParserName,
    Thoughts,
    ToolForm,
    ToolParserName,
    carries_tools,
    thinks,
    tool_form_of,
)
from kvferry_gateway.parsing.reasoning import CLOSE
from kvferry_gateway.requests.openai import ChatRequest
from kvferry_gateway.requests.strict_calls import grammar_of_own_calls
from kvferry_gateway.requests.structured import Constraint
from kvferry_gateway.requests.tools import NamedTool, schema_of_calls


class ReadingRules:
    """One model's: told by its chat template, unless a setting says otherwise."""

    def __init__(
        self,
        model: ModelDir,
        tokenizer: Tokenizer,
        tool_call_parser: ToolParserName = "auto",
        reasoning_parser: ReasoningParserName = "auto",
    ) -> None:
        template = model.chat_template or ""
        self._form: ToolForm | None
        if tool_call_parser != "auto":
            self._form = tool_call_parser
        else:
            # A template that knows of no tools is shown them in Hermes' form.
            self._form = tool_form_of(template) if carries_tools(template) else "hermes"
        self._thinks = thinks(template) if reasoning_parser == "auto" else reasoning_parser == "think"
        backend = tokenizer.backend
        self.special: Final = {backend.id_to_token(token) or "": token for token in tokenizer.special_token_ids}
        self._thoughts_end = backend.token_to_id(CLOSE)
        marks = (*(MARKS[self._form] if self._form else ()), *(THOUGHT_MARKS if self._thinks else ()))
        ids = (backend.token_to_id(mark) for mark in marks)
        # Special tokens that have a text nonetheless, for those answers that are read.
        self.shown: Final = frozenset(token for token in ids if token in tokenizer.special_token_ids)

    def of(self, request: ChatRequest, thoughts: Thoughts, *, constrained: bool) -> Reading:
        """`thoughts`: where the answer begins. `constrained`: by a grammar. Raises `ApiError` 400."""
        if not self._thinks or (constrained and self._grammar_start(thoughts) is None):
            thoughts = "none"  # a grammar that begins at once leaves no room for them
        tools = request.usable_tools
        if not tools:
            return PLAIN_TEXT if thoughts == "none" else Reading(thoughts=thoughts, thoughts_end=self._thoughts_end)
        if self._form is None and not request.demands_a_call:
            raise bad_request(
                "How this model writes tool calls is not known: demand one with 'tool_choice', or set the gateway's "
                "--tool-call-parser.",
                "tools", "unsupported_value",
            )  # fmt: skip
        return Reading(
            form=self._form,
            names=frozenset(tool.function.name for tool in tools),
            required=request.tool_choice == "required",
            named=request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None,
            parallel=request.parallel_tool_calls,
            thoughts=thoughts,
            thoughts_end=self._thoughts_end,
        )

    def constraint(self, request: ChatRequest) -> Constraint | None:
        """The grammar of a demanded call, or of those to `strict` tools that the model makes of its own accord."""
        choice, grammar = request.tool_choice, None
        if isinstance(choice, NamedTool):
            tool = next(tool for tool in request.tools if tool.function.name == choice.function.name)
            grammar = Grammar("json", json.dumps(tool.schema_of_arguments, ensure_ascii=False))
        elif choice == "required":
            grammar = Grammar("json", schema_of_calls(request.tools, parallel=request.parallel_tool_calls))
        elif self._form is not None and any(tool.function.strict for tool in request.usable_tools):
            parallel = request.parallel_tool_calls
            grammar = grammar_of_own_calls(self._form, request.usable_tools, self.special, parallel=parallel)
        if grammar is None:
            return None
        if len(grammar.source) > MAX_GRAMMAR_CHARS:
            raise bad_request(f"The schemas have more than {MAX_GRAMMAR_CHARS} characters.", "tools", "invalid_value")
        return Constraint(grammar, "tools")

    def placed(self, grammar: Grammar, thoughts: Thoughts) -> Grammar:
        """A grammar where the answer begins within thoughts begins behind them."""
        start = self._grammar_start(thoughts) if self._thinks else None
        return grammar if start is None else Grammar(grammar.kind, grammar.source, start)

    def _grammar_start(self, thoughts: Thoughts) -> int | None:
        return self._thoughts_end if thoughts == "open" else None
