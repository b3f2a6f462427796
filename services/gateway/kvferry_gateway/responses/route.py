"""The way of a `/v1/responses` body to the chat that it amounts to, and of the chat's errors back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from kvferry_gateway.body import parse
from kvferry_gateway.completions import Asked
from kvferry_gateway.errors import ApiError
from kvferry_gateway.requests.responses import ResponsesRequest
from kvferry_gateway.responses.answer import ResponseAnswer

# A chat's fields, and what they are called here.
_NAMES: Final = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
}


def read_response(body: bytes) -> Asked:
    """Raises `ApiError` 400."""
    request = parse(ResponsesRequest, body)
    return Asked(request.as_chat(), partial(ResponseAnswer, request))


@contextmanager
def renamed_for_responses() -> Iterator[None]:
    """An error names the field that the client has sent."""
    try:
        yield
    except ApiError as error:
        name = _NAMES.get(error.param or "")
        if name is not None and error.code != "unknown_parameter":  # that one the client has sent
            error.message = error.message.replace(f"'{error.param}'", f"'{name}'")
            error.param = name
        raise
