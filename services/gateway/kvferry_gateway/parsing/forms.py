"""Which of the forms a model writes, told by its chat template, and the parser for one choice of a request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvferry_gateway.parsing import hermes, llama3, mistral, reasoning
from kvferry_gateway.parsing.forced import NamedParser, RequiredParser
from kvferry_gateway.parsing.hermes import HermesParser
from kvferry_gateway.parsing.llama3 import Llama3Parser
from kvferry_gateway.parsing.mistral import MistralParser
from kvferry_gateway.parsing.parser import OutputParser
from kvferry_gateway.parsing.reasoning import ReasoningParser

ToolForm = Literal["hermes", "llama3_json", "mistral"]
ToolParserName = Literal["auto", "hermes", "llama3_json", "mistral"]
ReasoningParserName = Literal["auto", "none", "think"]
Thoughts = Literal["none", "maybe", "open"]  # "open": the prompt ends within them

# What a form is written with. Where these are special tokens, they have a text for the parser.
MARKS: Final[dict[ToolForm, tuple[str, ...]]] = {
    "hermes": (hermes.OPEN, hermes.CLOSE),
    "llama3_json": (llama3.TAG,),
    "mistral": (mistral.MARK, mistral.ARGS, mistral.CALL_ID),
}
THOUGHT_MARKS: Final = (reasoning.OPEN, reasoning.CLOSE)


def tool_form_of(template: str) -> ToolForm | None:
    """The form of calls that a template shows. None: none that is known here."""
    if mistral.MARK in template:
        return "mistral"
    if hermes.OPEN in template:
        return "hermes"
    # Llama 3.2's template has no tag, but shows the object.
    if llama3.TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return "llama3_json"
    return None


def carries_tools(template: str) -> bool:
    """Whether a template writes the tools of a request into the prompt."""
    return "tools" in template


def thinks(template: str) -> bool:
    """Whether a model of this template thinks before it answers."""
    return reasoning.CLOSE in template


def thoughts_of(prompt: str) -> Thoughts:
    """Where an answer to this rendered prompt begins. For models that think."""
    ending = prompt.rstrip()
    if ending.endswith(reasoning.OPEN):
        return "open"
    # Templates write an empty pair of tags where the request wants no thoughts.
    return "none" if ending.endswith(reasoning.CLOSE) else "maybe"


@dataclass(frozen=True, slots=True)
class Reading:
    """How the choices of one request are read."""

    form: ToolForm | None = None  # of calls that the model may make of itself; None: it may make none
    names: Collection[str] = ()  # of the request's tools
    required: bool = False  # the text is a list of calls
    named: str | None = None  # the text is the arguments of this tool
    parallel: bool = True  # more than one call
    thoughts: Thoughts = "none"
    thoughts_end: int | None = None  # the token of </think>

    def num_thought_tokens(self, tokens: Sequence[int]) -> int | None:
        """How many of a choice's tokens are thoughts. None: the model thinks none, or how many can't be told."""
        if self.thoughts == "none" or self.thoughts_end is None:
            return None
        if self.thoughts_end in tokens:
            return tokens.index(self.thoughts_end) + 1
        return len(tokens) if self.thoughts == "open" else 0

    def parser(self) -> OutputParser | None:
        """For one choice; None: its text is its content."""
        answer = self._answer_parser()
        return answer if self.thoughts == "none" else ReasoningParser(answer, is_open=self.thoughts == "open")

    def _answer_parser(self) -> OutputParser | None:
        max_calls = None if self.parallel else 1
        if self.named is not None:
            return NamedParser(self.named)
        if self.required:
            return RequiredParser(max_calls=max_calls)
        match self.form:
            case "hermes":
                return HermesParser(max_calls=max_calls)
            case "llama3_json":
                return Llama3Parser(self.names, max_calls)
            case "mistral":
                return MistralParser(max_calls=max_calls)
            case None:
                return None


PLAIN_TEXT: Final = Reading()
