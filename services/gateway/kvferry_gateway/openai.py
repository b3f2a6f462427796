"""What clients may send to `/v1/chat/completions` and `/v1/completions`.

Three kinds of fields: built ones (the models below), known ones that are not built and are accepted only at
a value at which they do nothing (`NEUTRAL`), and unknown ones. The last two are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvferry.text.stop import MAX_STOP_CHARS, MAX_STOP_STRINGS
from kvferry.wire.messages import MAX_REPETITION_PENALTY
from kvferry_gateway.errors import ApiError, bad_request, unsupported

MAX_LABEL_CHARS: Final = 512
MAX_METADATA: Final = 64  # entries; OpenAI takes 16

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 32) - 1)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Model):
    include_usage: bool = False


class GenerationRequest(_Model):
    """Fields that both routes share. None: not given."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None  # -1 and 0: no limit
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MAX_REPETITION_PENALTY)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    ignore_eos: bool = False
    # Labels. They change nothing and are never logged.
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=MAX_METADATA)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise bad_request("'stream_options' is only allowed when 'stream' is true.", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def token_limit_field(self) -> str:
        """The field that `token_limit` came from, for errors."""
        return "max_tokens"


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Label | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it. Text parts are joined by line breaks, as vLLM joins them."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def token_limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class CompletionRequest(GenerationRequest):
    prompt: str | Annotated[list[TokenId], Field(min_length=1)]


R = TypeVar("R", bound=GenerationRequest)


def _is(*values: object) -> Callable[[object], bool]:
    """Equal in value and in kind: `true` is not 1."""
    return lambda given: any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)


_COMMON_NEUTRAL: Final[dict[str, Callable[[object], bool]]] = {
    "n": _is(1),
    "length_penalty": _is(1),
    "logit_bias": _is({}),
    "min_tokens": _is(0),
    "stop_token_ids": _is([]),
    "bad_words": _is([]),
    "skip_special_tokens": _is(True),
    "spaces_between_special_tokens": _is(True),
    "include_stop_str_in_output": _is(False),
    "use_beam_search": _is(False),
    "response_format": _is({"type": "text"}),
    "priority": _is(0),
    "return_token_ids": _is(False),
}
# Known fields and whether a value of theirs does nothing. `null` always does nothing.
NEUTRAL: Final[dict[type[GenerationRequest], dict[str, Callable[[object], bool]]]] = {
    ChatRequest: {
        **_COMMON_NEUTRAL,
        "logprobs": _is(False),
        "top_logprobs": _is(0),
        "tools": _is([]),
        "tool_choice": _is("none", "auto"),
        "parallel_tool_calls": _is(True, False),
        "functions": _is([]),
        "function_call": _is("none", "auto"),
        "modalities": _is(["text"]),
        "service_tier": _is("auto", "default"),
        "store": _is(False),
        "echo": _is(False),
        "add_generation_prompt": _is(True),
        "continue_final_message": _is(False),
        "add_special_tokens": _is(False),
        "chat_template_kwargs": _is({}),
    },
    CompletionRequest: {
        **_COMMON_NEUTRAL,
        "best_of": _is(1),
        "echo": _is(False),
        "suffix": _is(""),
        "add_special_tokens": _is(True),
    },
}
_MESSAGE_NEUTRAL: Final = {"tool_calls": _is([])}


def parse(kind: type[R], body: bytes | bytearray) -> R:
    """Raises `ApiError` 400, which names the field."""
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    given = _without_neutral(given, NEUTRAL[kind])
    messages = given.get("messages")
    if isinstance(messages, list):
        given["messages"] = [
            _without_neutral(message, _MESSAGE_NEUTRAL, f"messages[{i}].") if isinstance(message, dict) else message
            for i, message in enumerate(messages)
        ]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _named(error) from None


def _without_neutral(
    given: dict[str, Any], neutral: dict[str, Callable[[object], bool]], where: str = ""
) -> dict[str, Any]:
    """`given` without nulls and without known fields that do nothing. Raises `ApiError` for those that would."""
    kept = {}
    for field, value in given.items():
        if value is None:
            continue
        if (does_nothing := neutral.get(field)) is None:
            kept[field] = value
        elif not does_nothing(value):
            raise unsupported(where + field)
    return kept


def _named(error: ValidationError) -> ApiError:
    """The first problem as OpenAI would put it; an alternative of a union is no part of the field's name."""
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    where = first["loc"] if _is_field(first["loc"][-1]) else first["loc"][:-1]
    # Where a field takes several forms, the form that got furthest is the one that was meant.
    first = max((other for other in problems if other["loc"][: len(where)] == where), key=lambda p: len(p["loc"]))
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif _is_field(part):
            param += f".{part}" if param else part
    match first["type"]:
        case "extra_forbidden":
            return bad_request(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
        case "missing":
            return bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
        case _:
            problem = first["msg"][:1].lower() + first["msg"][1:]
            return bad_request(f"Invalid '{param}': {problem}.", param, "invalid_value")


def _is_field(part: str | int) -> bool:
    # Pydantic puts the names of a union's alternatives ("str", "list[…]", "constrained-str") in the path.
    return isinstance(part, int) or (part.isidentifier() and part != "str")
