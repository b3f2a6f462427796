"""From a request's body to its model.

Three kinds of fields: built ones (`openai.py`), known ones that are not built and are accepted only at a value at
which they do nothing (`NEUTRAL`), and unknown ones. The last two are refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvferry_gateway.errors import ApiError, bad_request, unsupported
from kvferry_gateway.openai import ChatRequest, CompletionRequest, RequestModel

R = TypeVar("R", bound=RequestModel)


def _is(*values: object) -> Callable[[object], bool]:
    """Equal in value and in kind: `true` is not 1."""
    return lambda given: any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)


_COMMON_NEUTRAL: Final[dict[str, Callable[[object], bool]]] = {
    "length_penalty": _is(1),
    "spaces_between_special_tokens": _is(True),
    "use_beam_search": _is(False),
    "response_format": _is({"type": "text"}),
    "priority": _is(0),
}
# Known fields and whether a value of theirs does nothing. `null` always does nothing.
NEUTRAL: Final[dict[type[RequestModel], dict[str, Callable[[object], bool]]]] = {
    ChatRequest: {
        **_COMMON_NEUTRAL,
        "tools": _is([]),
        "tool_choice": _is("none", "auto"),
        "parallel_tool_calls": _is(True, False),
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
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    where = tuple(itertools.takewhile(_is_field, first["loc"]))
    # Where a field takes several forms, the form that got furthest before its first problem is the one that was meant.
    forms: dict[tuple[str | int, ...], ErrorDetails] = {}
    for problem in problems:
        if problem["loc"][: len(where)] == where:
            forms.setdefault(problem["loc"][: len(where) + 1], problem)
    first = max(forms.values(), key=lambda p: (len(p["loc"]), [part for part in p["loc"] if isinstance(part, int)]))
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


def _is_field(part: str | int) -> bool:
    # Pydantic puts the names of a union's alternatives ("str", "list[…]", "constrained-str") in the path.
    return isinstance(part, int) or (part.isidentifier() and part != "str")
