"""The gateway's ASGI application: routes, keys, CORS, bodies, errors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

from kvferry.log import get_logger
from kvferry.metrics import Metrics
from kvferry.runtime import now
from kvferry.wire.fields import MAX_NAME_CHARS
from kvferry_gateway.answers.chat_answer import ChatAnswer
from kvferry_gateway.answers.text_answer import TextAnswer
from kvferry_gateway.body import parse
from kvferry_gateway.completions import Asked, Completions
from kvferry_gateway.console.route import DRAIN, PAGES, STATE, Console
from kvferry_gateway.errors import (
    ApiError,
    ClientGone,
    bad_request,
    body_too_large,
    drains_with_key,
    internal_error,
    invalid_api_key,
    method_not_allowed,
    not_found,
    not_served,
    only_local,
)
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.http.asgi import Caller, Exchange, Scope, respond
from kvferry_gateway.http.auth import ApiKey, ApiKeys
from kvferry_gateway.http.connection import Receive, Send
from kvferry_gateway.http.cors import Cors, Header
from kvferry_gateway.models import Models, ServedModel
from kvferry_gateway.openapi import document
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.responses.route import read_response, renamed_for_responses
from kvferry_gateway.spans import begin_request, end_request
from kvferry_gateway.tokenize import TokenService

_REQUEST_ID: Final = re.compile(rb"[!-~]{1,%d}" % MAX_NAME_CHARS)
_LOOPBACK: Final = re.compile(r"127\.|::1$|::ffff:127\.")
MODELS: Final = "/v1/models"
VERSION: Final = importlib.metadata.version("kvferry")
# Parts of OpenAI's and vLLM's APIs that clients know and this server does not have.
NOT_SERVED: Final = (
    "/v1/embeddings", "/v1/moderations", "/v1/images", "/v1/audio", "/v1/files", "/v1/batches", "/v1/fine_tuning",
    "/v1/assistants", "/v1/threads", "/v1/realtime", "/v1/rerank", "/v1/score", "/pooling", "/classify", "/score",
    "/rerank",
)  # fmt: skip
MAX_WAITING_SHOWN: Final = 100  # requests without a worker that /v1/cluster names

log = get_logger(__name__)


Handler = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Route:
    method: str
    handler: Handler
    access: str  # "open", "key" (when keys are on), "operator" (a key, or this machine), "bearer" (a key, always)
    traced: bool = False


def _document() -> bytes:
    return json.dumps(document(VERSION), separators=(",", ":")).encode()


class GatewayApp:
    """`app(scope, receive, send)`. No state but what it is given, and the document about itself."""

    def __init__(
        self,
        fleet: Fleet,
        completions: Completions,
        models: Models,
        keys: ApiKeys | None,
        created: int,
    ) -> None:
        self._fleet = fleet
        self._completions = completions
        self._models = models
        self._tokens = TokenService(models, completions.max_model_len)
        self._keys = keys
        self._created = created
        self._cors = Cors(fleet.settings.cors_origins)
        self._metrics: Metrics = fleet.metrics
        self._max_body = fleet.settings.max_body_bytes
        self._console = Console(fleet)
        self._document: bytes | None = None  # made when it is first asked for
        self._routes = {
            "/v1/chat/completions": _Route("POST", self._chat, "key", traced=True),
            "/v1/completions": _Route("POST", self._text, "key", traced=True),
            "/v1/responses": _Route("POST", self._responses, "key", traced=True),
            MODELS: _Route("GET", self._list_models, "key"),
            "/tokenize": _Route("POST", self._tokenize, "key"),
            "/detokenize": _Route("POST", self._detokenize, "key"),
            "/v1/cluster": _Route("GET", self._cluster, "operator"),
            "/health": _Route("GET", self._health, "open"),
            "/ping": _Route("GET", self._health, "open"),
            "/version": _Route("GET", self._version, "open"),
            "/load": _Route("GET", self._load, "open"),
            "/ready": _Route("GET", self._ready, "open"),
            "/openapi.json": _Route("GET", self._openapi, "open"),
            "/metrics": _Route("GET", self._serve_metrics, "open"),
            **{path: _Route("GET", self._console.page, "open") for path in PAGES},
            STATE: _Route("GET", self._console.state, "operator"),
            DRAIN: _Route("POST", self._drain, "bearer"),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = dict(scope["headers"])
        request_id = given.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = self._fleet.runtime.random_bytes(8).hex().encode()
        headers: list[Header] = [(b"x-request-id", request_id), *self._cors.headers(given.get(b"origin"))]
        status: int | None = None  # of the answer that has begun

        async def sending(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        exchange = Exchange(scope, receive, sending, Caller(request_id.decode(), b"", headers))
        try:
            await self._dispatch(exchange, given)
        except ClientGone:
            return
        except ApiError as error:
            await respond(sending, error.status, error.body, [*exchange.caller.headers, *error.headers])
        except Exception:
            log.exception("request failed", request_id=request_id.decode(), path=scope["path"][:128])
            if status is not None:
                raise  # the server closes the connection: the client must not take it for a whole answer
            failure = internal_error()
            await respond(sending, failure.status, failure.body, exchange.caller.headers)
        finally:
            if (span := exchange.caller.span) is not None:
                end_request(span, status, now())

    async def _dispatch(self, exchange: Exchange, given: dict[bytes, bytes]) -> None:
        scope = exchange.scope
        path, method = scope["path"], scope["method"]
        route = self._routes.get(path)
        if route is None and path.startswith(MODELS + "/"):
            route = _Route("GET", self._show_model, "key")
        if route is None:
            raise not_served(path) if path.startswith(NOT_SERVED) else not_found(path)
        allowed = "GET, HEAD, OPTIONS" if route.method == "GET" else "POST, OPTIONS"
        if method == "OPTIONS":
            asked = given.get(b"access-control-request-headers")
            preflight = self._cors.preflight(given.get(b"origin"), allowed, asked)
            headers = [(b"allow", allowed.encode()), *exchange.caller.labels[:1], *preflight]
            return await respond(exchange.send, 200, b"", headers)
        if method != route.method and not (method == "HEAD" and route.method == "GET"):
            raise method_not_allowed(method, allowed)
        key = self._check_access(route, scope, given)
        if key is not None:
            exchange.caller = replace(exchange.caller, salt=key.salt, allowance=key.allowance)
        if route.traced and (tracer := self._fleet.tracer) is not None:
            span = begin_request(tracer, scope, exchange.caller.request_id, now())
            exchange.caller = replace(exchange.caller, span=span)
        await route.handler(exchange)

    def _check_access(self, route: _Route, scope: Scope, given: dict[bytes, bytes]) -> ApiKey | None:
        """The caller's key, where one is asked for. Raises `ApiError` 401 or 403."""
        if route.access == "open":
            return None
        if self._keys is not None:
            key = self._keys.find(given.get(b"authorization", b""))
            if key is None:
                raise invalid_api_key()
            return key
        if route.access == "bearer":
            raise drains_with_key()
        if route.access == "operator":
            client = scope.get("client")
            if client is None or not _LOOPBACK.match(client[0]):
                raise only_local()
        return None

    async def _body(self, exchange: Exchange) -> bytes:
        """Raises `ApiError` 413 before memory is taken for what is too large, `ClientGone`."""
        for name, value in exchange.scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self._max_body:
                raise body_too_large(self._max_body)
        body = bytearray()
        while True:
            message = await exchange.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("the client closed its connection")
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise body_too_large(self._max_body)
            if not message.get("more_body", False):
                break
        if not body:
            raise bad_request("The request has no body.", code="invalid_json")
        return bytes(body)

    # -- routes ----------------------------------------------------------------------------------------------

    async def _chat(self, exchange: Exchange) -> None:
        body = await self._body(exchange)
        await self._completions.serve("chat", lambda: Asked(parse(ChatRequest, body), ChatAnswer), exchange)

    async def _text(self, exchange: Exchange) -> None:
        body = await self._body(exchange)
        await self._completions.serve("text", lambda: Asked(parse(CompletionRequest, body), TextAnswer), exchange)

    async def _responses(self, exchange: Exchange) -> None:
        body = await self._body(exchange)
        with renamed_for_responses():
            await self._completions.serve("responses", lambda: read_response(body), exchange)

    async def _tokenize(self, exchange: Exchange) -> None:
        body = await self._body(exchange)
        await exchange.json(await self._tokens.tokenize(body))

    async def _detokenize(self, exchange: Exchange) -> None:
        await exchange.json(self._tokens.detokenize(await self._body(exchange)))

    def _model_entry(self, model: ServedModel) -> dict[str, Any]:
        entry = {"id": model.name, "object": "model", "created": self._created, "owned_by": "kvferry"}
        return {**entry, "max_model_len": self._fleet.registry.max_model_len(model.name)}

    async def _list_models(self, exchange: Exchange) -> None:
        await exchange.json({"object": "list", "data": [self._model_entry(model) for model in self._models]})

    async def _show_model(self, exchange: Exchange) -> None:
        name = exchange.scope["path"].removeprefix(MODELS + "/")
        await exchange.json(self._model_entry(self._models.named(name[:256])))

    async def _cluster(self, exchange: Exchange) -> None:
        fleet, moment = self._fleet, now()
        gateway = {
            "name": fleet.settings.name,
            "incarnation": f"{fleet.incarnation:016x}",
            "live_attempts": len(fleet.table),
            "waiting": [
                {
                    "request_id": unit.request_id,
                    "model": unit.model,
                    "waiting_s": round(moment - unit.since, 3),
                    "why": unit.why,
                }
                for unit in islice(fleet.waiting.values(), MAX_WAITING_SHOWN)
            ],
            "placement": {model: placer.report(moment) for model, placer in fleet.placers.items()},
        }
        workers = fleet.registry.rows(moment)
        await exchange.json({"cluster": fleet.settings.cluster, "gateway": gateway, "workers": workers})

    async def _drain(self, exchange: Exchange) -> None:
        await exchange.json(self._console.drain(await self._body(exchange)))

    async def _health(self, exchange: Exchange) -> None:
        await exchange.json({"status": "ok"})

    async def _version(self, exchange: Exchange) -> None:
        await exchange.json({"version": VERSION})

    async def _load(self, exchange: Exchange) -> None:
        """As vLLM tells it: what is under way."""
        await exchange.json({"server_load": self._completions.num_live})

    async def _ready(self, exchange: Exchange) -> None:
        """Whether requests should come here: a model without workers is no reason to keep those of others away."""
        served = [name for name in self._models.names if self._fleet.registry.has_pair(name)]
        if self._completions.draining:
            await exchange.json({"status": "draining"}, 503)
        elif not served:
            await exchange.json({"status": "no_worker"}, 503)
        else:
            await exchange.json({"status": "ready", "models": served})

    async def _openapi(self, exchange: Exchange) -> None:
        if self._document is None:
            with contextlib.closing(self._fleet.runtime.lane("openapi", nice=5)) as lane:
                self._document = await lane.run(_document)
        await respond(exchange.send, 200, self._document, exchange.caller.headers)

    async def _serve_metrics(self, exchange: Exchange) -> None:
        await self._metrics.asgi(exchange.scope, exchange.receive, exchange.send)
