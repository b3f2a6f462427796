"""Errors that a client sees, in OpenAI's form.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Every constructor below is one row of the API's error table; nothing else builds an `ApiError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Literal

from kvferry.errors import KvferryError

INVALID_REQUEST = "invalid_request_error"


class ApiError(KvferryError):
    """Ends a request: as an HTTP answer before its stream has begun, else as an event of the stream."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.retry_after = retry_after  # seconds
        self._headers = headers

    @property
    def body(self) -> bytes:
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": fields}, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = list(self._headers)
        if self.retry_after is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after))).encode()))
        return headers


class ClientGone(KvferryError):
    """The client has closed its connection: nobody is left to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(field: str) -> ApiError:
    """A known field of the API with a value that is not built. Never ignored in silence."""
    return ApiError(400, f"'{field}' is not supported with this value.", param=field, code="unsupported_value")


def grammar_failed(detail: str) -> ApiError:
    """A worker could not follow what the gateway could compile: another one could not either."""
    return ApiError(400, f"The output can't be made to follow its grammar: {detail}", code="grammar_failed")


def context_length_exceeded(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def invalid_api_key() -> ApiError:
    return ApiError(
        401,
        "Incorrect or missing API key: send it as 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers=((b"www-authenticate", b"Bearer"),),
    )


def only_local() -> ApiError:
    return ApiError(
        403, "Open only to this machine, or to bearers of a key (--api-key-file).", code="permission_denied"
    )


def drains_with_key() -> ApiError:
    return ApiError(
        403, "Open only to bearers of a key; this gateway has none (--api-key-file).", code="permission_denied"
    )


def no_such_worker(incarnation: str) -> ApiError:
    return ApiError(
        404, f"No worker here has the incarnation {incarnation}.", param="incarnation", code="worker_not_found"
    )


def model_not_found(model: str) -> ApiError:
    return ApiError(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")


def model_not_named(names: Sequence[str]) -> ApiError:
    message = f"Missing required parameter: 'model'. There are: {', '.join(names)}."
    return bad_request(message, "model", "missing_required_parameter")


def not_found(path: str) -> ApiError:
    return ApiError(404, f"Unknown path: {path[:256]}", code="unknown_url")


def not_served(path: str) -> ApiError:
    """A path of OpenAI's API that needs another kind of model."""
    return ApiError(404, f"{path[:256]} is not served here: this server generates text.", code="unknown_url")


def method_not_allowed(method: str, allowed: str) -> ApiError:
    return ApiError(
        405,
        f"Not allowed method ({method[:16]}); allowed: {allowed}",
        code="method_not_supported",
        headers=((b"allow", allowed.encode()),),
    )


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


def too_many_requests(message: str, retry_after: float) -> ApiError:
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)


def rate_limited(kind: Literal["requests", "tokens"], limit: int, used: int, asked: int, wait: float) -> ApiError:
    """A key has used up its minute; `type` says of what, as OpenAI has it."""
    message = f"Rate limit reached for this key on {kind} per minute: limit {limit}, used {used}, requested {asked}."
    message += f" Please try again in {max(1, math.ceil(wait))} s."
    return ApiError(429, message, type=kind, code="rate_limit_exceeded", retry_after=wait)


def too_many_tokens_asked(asked: int, limit: int) -> ApiError:
    message = f"Request too large for this key: {asked} tokens, prompt and output, of {limit} per minute."
    # OpenAI's clients take it as a word not to repeat what can never be granted.
    headers = ((b"x-should-retry", b"false"),)
    return ApiError(429, message, type="tokens", code="rate_limit_exceeded", headers=headers)


def internal_error() -> ApiError:
    return ApiError(500, "The gateway failed on this request.", type="server_error", code="internal_error")


def no_worker(message: str) -> ApiError:
    return ApiError(503, message, type="server_error", code="no_worker", retry_after=1.0)


def numerics_gone(numerics_id: str) -> ApiError:
    """`exact`: other workers are there, but their bits would differ from what the client has."""
    message = f"No worker of numerics '{numerics_id}' is left, on which this request began; no other may go on with it."
    return ApiError(503, message, type="server_error", code="numerics_gone", retry_after=1.0)


def failures_used_up(num_failures: int, last: str) -> ApiError:
    message = f"The request failed {num_failures} times on its workers, last: {last}."
    return ApiError(503, message, type="server_error", code="worker_failed")


def shutting_down() -> ApiError:
    return ApiError(503, "The gateway is shutting down.", type="server_error", code="shutting_down", retry_after=1.0)


def deadline_exceeded(seconds: float) -> ApiError:
    return ApiError(
        504, f"The request did not end within {seconds:g} s.", type="server_error", code="deadline_exceeded"
    )
