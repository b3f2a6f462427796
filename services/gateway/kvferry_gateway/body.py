"""From a request's body to its model.

Three kinds of fields: built ones (`requests/openai.py`), known ones that are not built and are accepted only at a value
at which they do nothing (`NEUTRAL`), and unknown ones. The last two are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvferry_gateway.errors import ApiError, bad_request, unsupported
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.responses import ResponsesRequest

R = TypeVar("R", bound=RequestModel)


def _is(*values: object) -> Callable[[object], bool]:
    """Equal in value and in kind: `true` is not 1."""
    return lambda given: any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)


_COMMON_NEUTRAL: Final[dict[str, Callable[[object], bool]]] = {
    "length_penalty": _is(1),
    "spaces_between_special_tokens": _is(True),
    "use_beam_search": _is(False),
}
# Known fields and whether a value of theirs does nothing. `null` always does nothing.
NEUTRAL: Final[dict[type[RequestModel], dict[str, Callable[[object], bool]]]] = {
    ChatRequest: {
        **_COMMON_NEUTRAL,
        "functions": _is([]),
        "function_call": _is("none", "auto"),
        "modalities": _is(["text"]),
        "service_tier": _is("auto", "default"),
        "store": _is(False),
        "echo": _is(False),
    },
    CompletionRequest: {
        **_COMMON_NEUTRAL,
        "suffix": _is(""),
    },
    ResponsesRequest: {
        "background": _is(False),
        "conversation": _is(),
        "context_management": _is([]),
        "max_tool_calls": _is(),
        "moderation": _is(),
        "prompt": _is(),
        "prompt_cache_retention": _is("in_memory", "24h"),
        "reasoning": lambda given: isinstance(given, dict) and not any(given.values()),
        "service_tier": _is("auto", "default"),
        "truncation": _is("disabled"),
    },
}
_MESSAGE_NEUTRAL: Final = {"annotations": _is([]), "function_call": _is(), "refusal": _is(), "audio": _is()}


def parse(kind: type[R], body: bytes | bytearray) -> R:
    """Raises `ApiError` 400, which names the field."""
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    given = _without_neutral(given, NEUTRAL.get(kind, {}))
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
    first = _meant(error.errors(include_url=False, include_input=False))
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
            what = first["msg"][:1].lower() + first["msg"][1:]
            return bad_request(f"Invalid '{param}': {what}.", param, "invalid_value")


def _meant(problems: Sequence[ErrorDetails], depth: int = 0) -> ErrorDetails:
    """The first problem. Where a field takes several forms, that of the form that got furthest before it."""
    first = problems[0]
    form = next((at for at, part in enumerate(first["loc"]) if at >= depth and not _is_field(part)), None)
    if form is None:
        return first
    forms: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for problem in problems:
        if problem["loc"][:form] == first["loc"][:form]:
            forms.setdefault(problem["loc"][: form + 1], []).append(problem)
    best = [_meant(problems, form + 1) for problems in forms.values()]
    return max(best, key=lambda p: (len(p["loc"]), [part for part in p["loc"] if isinstance(part, int)]))


def _is_field(part: str | int) -> bool:
    # Pydantic puts the names of a union's alternatives ("str", "list[…]", "constrained-str") in the path.
    return isinstance(part, int) or (part.isidentifier() and part != "str")
