"""The route behind `/v1/chat/completions` and `/v1/completions`: one request from its body to its last byte."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kvferry.log import get_logger
from kvferry.runtime import now, wall_clock
from kvferry.wire.messages import pack_tokens
from kvferry_gateway.answers import DONE, Answer, ChatAnswer, FinishReason, TextAnswer, Usage, sse
from kvferry_gateway.connection import EXTENSION, AsgiConnection, ClientConnection, Receive, Send
from kvferry_gateway.errors import (
    ApiError,
    ClientGone,
    internal_error,
    model_not_found,
    shutting_down,
    too_many_requests,
)
from kvferry_gateway.fleet import Fleet
from kvferry_gateway.flight import Flight
from kvferry_gateway.offer import Unit
from kvferry_gateway.openai import ChatRequest, CompletionRequest, parse
from kvferry_gateway.prompt import Prompter
from kvferry_gateway.streams import TokenStream

Scope = dict[str, Any]
Header = tuple[bytes, bytes]
T = TypeVar("T")

RETRY_AFTER_S: Final = 1.0
# How long a client may take to read the end of an answer that is complete; the second one while shutting down.
LINGER_S: Final = 30.0
SHUTDOWN_LINGER_S: Final = 1.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """What the request's head says about who asks."""

    request_id: str  # a label, at most MAX_NAME_CHARS
    salt: bytes  # root of the prefix cache
    headers: list[Header]  # that every answer gets


class Completions:
    """One gateway's requests under way."""

    def __init__(self, fleet: Fleet, prompter: Prompter, model_name: str, max_context: int) -> None:
        """`max_context`: the model's own limit in tokens, for as long as no worker has told its."""
        self.draining = False
        self._fleet = fleet
        self._prompter = prompter
        self._model_name = model_name
        self._max_context = max_context
        self._metrics = fleet.metrics
        self._max_requests = fleet.settings.max_requests
        self._num_admitted = 0
        self._live = 0
        self._flights: dict[Flight, ClientConnection] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def chat(self, body: bytes, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve("chat", ChatRequest, ChatAnswer, body, caller, scope, receive, send)

    async def text(self, body: bytes, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve("text", CompletionRequest, TextAnswer, body, caller, scope, receive, send)

    async def drain(self, grace: float) -> None:
        """Take no more; give what is under way `grace` seconds, then end it with an error."""
        self.draining = True
        idle = asyncio.ensure_future(self._idle.wait())
        await asyncio.wait((idle,), timeout=grace)
        if not idle.done():
            log.warning("requests cut off", num_requests=self._live)
            for flight in list(self._flights):
                flight.shut_down()
            await asyncio.wait((idle,), timeout=SHUTDOWN_LINGER_S)
            for connection in list(self._flights.values()):
                connection.abort()
            await idle

    # -- one request -----------------------------------------------------------------------------------------

    async def _serve(
        self,
        route: str,
        kind: type[ChatRequest] | type[CompletionRequest],
        form: type[Answer],
        body: bytes,
        caller: Caller,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Raises `ApiError` for whatever ends the request before its answer has begun."""
        outcome = "error"
        began = now()
        self._admit()
        try:
            request = parse(kind, body)
            if request.model != self._model_name:
                raise model_not_found(request.model)
            max_model_len = self._fleet.registry.max_model_len(self._model_name) or self._max_context
            prompt = await self._prompter.prepare(request, min(max_model_len, self._max_context))
            answer = form(
                form.id_prefix + self._fleet.runtime.random_bytes(16).hex(),
                self._model_name,
                int(wall_clock()),
                include_usage=request.include_usage,
            )
            texts, limit = self._prompter.texts, prompt.sampling.max_tokens
            stream = (
                TokenStream(texts, request.stops, limit, answer.event_head, answer.event_tail)
                if request.stream
                else TokenStream(texts, request.stops, limit)
            )
            self._num_admitted += 1
            unit = Unit(
                number=self._num_admitted,
                request_id=caller.request_id,
                model=self._model_name,
                prompt=pack_tokens(prompt.tokens),
                sampling=prompt.sampling,
                salt=caller.salt,
                arrival=wall_clock(),
                prompt_field="messages" if kind is ChatRequest else "prompt",
            )
            flight = Flight(self._fleet, unit, stream, self._prompter.eos_token_ids)
            connection = _connection(scope, receive, send)
            self._flights[flight] = connection
            try:
                connection.watch(flight.abandon, lambda: stream.resume(now()))
                if connection.lost:
                    raise ClientGone("the client closed its connection")
                self._metrics.prompt_tokens.inc(unit.num_prompt)
                if request.stream:
                    outcome = await self._stream(flight, answer, request.include_usage, caller, connection, send)
                else:
                    outcome = await self._whole(flight, answer, caller, connection, send)
            finally:
                del self._flights[flight]
                self._fleet.attached.pop(stream, None)
                stream.detach()
                flight.close()
                await connection.close()
                self._measure(stream, began)
        except ClientGone:
            outcome = "client_gone"
        except ApiError as error:
            outcome = error.code or str(error.status)
            raise
        finally:
            self._metrics.requests.labels(route, outcome).inc()
            self._release()

    async def _stream(
        self,
        flight: Flight,
        answer: Answer,
        include_usage: bool,
        caller: Caller,
        connection: ClientConnection,
        send: Send,
    ) -> str:
        await flight.take_off()
        stream = flight.stream
        await send({"type": "http.response.start", "status": 200, "headers": [*_EVENT_STREAM, *caller.headers]})
        if first := answer.first_event():
            stream.pieces.insert(0, first)
        stream.attach(connection, now(), self._fleet.settings.max_backlog_bytes, lambda: self._too_slow(connection))
        self._fleet.attached[stream] = None
        outcome = "ok"
        try:
            reason = await flight.land()
            stream.finish()
            usage = _usage(flight) if include_usage else None
            last = answer.last_events("stop" if stream.stopped else reason, usage)
        except ApiError as error:
            outcome, last = error.code or str(error.status), sse(error.body) + DONE
        except ClientGone:
            raise
        except Exception:
            # The answer has begun as a 200: only an event can still tell the client.
            log.exception("stream failed", request_id=caller.request_id)
            outcome, last = "internal_error", sse(internal_error().body) + DONE
        stream.close(last, now())
        try:
            async with asyncio.timeout(LINGER_S):
                await connection.close()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            self._too_slow(connection)
            return "slow_client"
        return "client_gone" if connection.lost else outcome

    async def _whole(
        self, flight: Flight, answer: Answer, caller: Caller, connection: ClientConnection, send: Send
    ) -> str:
        await flight.take_off()
        reason: FinishReason = await flight.land()
        stream = flight.stream
        stream.finish()
        body = answer.whole(stream.take_text(), "stop" if stream.stopped else reason, _usage(flight))
        await connection.close()
        await respond(send, 200, body, caller.headers)
        return "ok"

    # -- accounts --------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        if self.draining:
            raise shutting_down()
        if self._live >= self._max_requests:
            raise too_many_requests("The gateway has as many requests as it takes; try again later.", RETRY_AFTER_S)
        self._live += 1
        self._metrics.live.set(self._live)
        self._idle.clear()

    def _release(self) -> None:
        self._live -= 1
        self._metrics.live.set(self._live)
        if self._live == 0:
            self._idle.set()

    def _measure(self, stream: TokenStream, began: float) -> None:
        if stream.first_token_at is not None:
            self._metrics.ttft.observe(stream.first_token_at - began)
        self._metrics.e2e.observe(now() - began)
        self._metrics.generated_tokens.inc(len(stream.tokens))
        self._metrics.cached_tokens.inc(stream.cached_tokens)

    def _too_slow(self, connection: ClientConnection) -> None:
        self._metrics.slow_clients.inc()
        connection.abort()


def _usage(flight: Flight) -> Usage:
    stream = flight.stream
    return Usage(flight.unit.num_prompt, len(stream.tokens), min(stream.cached_tokens, flight.unit.num_prompt))


def _connection(scope: Scope, receive: Receive, send: Send) -> ClientConnection:
    """The socket itself where our HTTP protocol class gave it, and chunked encoding is understood."""
    direct = scope.get("extensions", {}).get(EXTENSION)
    if isinstance(direct, ClientConnection) and scope["http_version"] == "1.1":
        return direct
    return AsgiConnection(receive, send)


_EVENT_STREAM: Final[tuple[Header, ...]] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the events back
    (b"transfer-encoding", b"chunked"),
)


async def respond(
    send: Send, status: int, body: bytes, headers: list[Header], kind: bytes = b"application/json"
) -> None:
    """A whole answer."""
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
