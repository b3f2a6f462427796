"""The OpenAPI 3.1 document of the gateway's routes, made from the models that validate their bodies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from kvferry_gateway.field_meanings import meaning_of
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.responses import ResponsesRequest
from kvferry_gateway.tokenize import DetokenizeRequest, TokenizeRequest

JSON: Final = "application/json"
Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, as a reader of the document needs to know it."""

    path: str
    method: str
    summary: str
    answer: Schema  # of the JSON of a 200
    request: type[RequestModel] | None = None
    streams: bool = False  # may answer with events
    errors: tuple[int, ...] = ()
    needs_key: bool = True
    kind: str = JSON
    parameters: tuple[str, ...] = ()  # of the path


def _object(**properties: str) -> Schema:
    """An object with at least these properties; `?` behind a type: may be null."""
    shown: Schema = {
        name: {"type": [kind[:-1], "null"] if kind.endswith("?") else kind} for name, kind in properties.items()
    }
    return {"type": "object", "properties": shown, "required": list(properties)}


_CHOICES: Final = _object(
    id="string", object="string", created="integer", model="string", choices="array", usage="object",
    system_fingerprint="string?",
)  # fmt: skip
_GENERATION_ERRORS: Final = (400, 401, 404, 408, 413, 429, 503, 504)
_STATUS: Final = _object(status="string")
_MODEL: Final = _object(id="string", object="string", created="integer", owned_by="string", max_model_len="integer?")

OPERATIONS: Final = (
    Operation(
        "/v1/chat/completions", "post", "Answer a conversation.", _CHOICES, ChatRequest, True, _GENERATION_ERRORS
    ),
    Operation(
        "/v1/completions", "post", "Continue texts.", _CHOICES, CompletionRequest, True, _GENERATION_ERRORS
    ),
    Operation(
        "/v1/responses", "post", "Answer a conversation of items; nothing is stored.",
        _object(id="string", object="string", created_at="integer", status="string", model="string", output="array"),
        ResponsesRequest, True, _GENERATION_ERRORS,
    ),
    Operation("/v1/models", "get", "The models.", _object(object="string", data="array"), errors=(401,)),
    Operation("/v1/models/{model}", "get", "One model.", _MODEL, errors=(401, 404), parameters=("model",)),
    Operation(
        "/tokenize", "post", "The tokens of a text or a conversation.",
        _object(count="integer", max_model_len="integer", tokens="array"),
        TokenizeRequest, errors=(400, 401, 404, 413),
    ),
    Operation(
        "/detokenize", "post", "The text of tokens.", _object(prompt="string"), DetokenizeRequest,
        errors=(400, 401, 404, 413),
    ),
    Operation("/v1/cluster", "get", "What this gateway sees of the cluster.",
              _object(cluster="string", gateway="object", workers="array"), errors=(401, 403)),
    Operation("/health", "get", "It runs.", _STATUS, needs_key=False),
    Operation("/ping", "get", "It runs.", _STATUS, needs_key=False),
    Operation("/ready", "get", "Whether requests can be served now.", _STATUS, errors=(503,), needs_key=False),
    Operation("/version", "get", "The version.", _object(version="string"), needs_key=False),
    Operation("/load", "get", "Answers under way.", _object(server_load="integer"), needs_key=False),
    Operation("/metrics", "get", "Metrics for Prometheus.", {"type": "string"}, needs_key=False, kind="text/plain"),
    Operation("/openapi.json", "get", "This document.", {"type": "object"}, needs_key=False),
)  # fmt: skip

ERRORS: Final[dict[int, str]] = {
    400: "The request is wrong; `param` names the field.",
    401: "The key is missing or unknown (`invalid_api_key`).",
    403: "Open only to this machine, or to bearers of a key.",
    404: "No such model (`model_not_found`) or path (`unknown_url`).",
    408: "The request did not arrive whole in time.",
    413: "The body is too large.",
    429: "No capacity, or over a rate limit; `Retry-After` says when to come again.",
    503: "No worker can serve it now.",
    504: "It did not end in time.",
}
_ERROR: Final[Schema] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def request_models() -> list[type[RequestModel]]:
    return [operation.request for operation in OPERATIONS if operation.request is not None]


def document(version: str) -> Schema:
    """Made once per process: it takes some ten milliseconds."""
    models = request_models()
    _, made = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = made["$defs"]
    for model in models:
        schema = schemas[model.__name__]
        schema.pop("description", None)
        for field, shown in schema["properties"].items():
            shown.pop("title", None)
            shown["description"] = meaning_of(model.__name__, field)
    schemas["Error"] = _ERROR
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvferry",
            "version": version,
            "description": "OpenAI's API, and what vLLM adds to it. Fields at a value of null count as not given.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation) -> Schema:
    content: Schema = {operation.kind: {"schema": operation.answer}}
    if operation.streams:
        content["text/event-stream"] = {}
    responses: Schema = {"200": {"description": "OK", "content": content}}
    for status in operation.errors:
        error = _STATUS if operation.path == "/ready" else {"$ref": "#/components/schemas/Error"}
        responses[str(status)] = {"description": ERRORS[status], "content": {JSON: {"schema": error}}}
    made: Schema = {"summary": operation.summary, "responses": responses}
    if operation.request is not None:
        body = {"$ref": f"#/components/schemas/{operation.request.__name__}"}
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    if operation.parameters:
        shape = {"in": "path", "required": True, "schema": {"type": "string"}}
        made["parameters"] = [{"name": name, **shape} for name in operation.parameters]
    if operation.needs_key:
        made["security"] = [{"key": []}, {}]  # a key is asked for only where the gateway has some
    return made
