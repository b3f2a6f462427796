"""HTTP clients without sockets: each request goes into the gateway's ASGI application, as its server would put it.

A client checks every event as it comes. It may read slowly, or leave at any moment, and it asks again where a real
one would: after a 429 or 503, and when its gateway has died.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from answers import LOGPROB_TOLERANCE, Check, WrongAnswer
from processes import acting_as
from workload import ClientRequest

from kvferry_gateway.http.connection import EXTENSION, ClientConnection, Message

if TYPE_CHECKING:
    from gateways import SimulatedGateway

CLIENTS = "clients"  # the process of all clients
SHUTTING_DOWN = "shutting_down"  # code of the error that ends a stream whose gateway stops
RETRY_AFTER_S = 0.5  # a client's wait after a 429 or 503
HIGH_WATER = 1024  # bytes unread by the client at which the server's socket says "pause"


class SimulatedSocket(ClientConnection):
    """The server's end of a connection, as `TransportConnection` is: what the client has not read waits here."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange
        self._unread = bytearray()

    def pack(self, body: bytes) -> bytes:
        return body

    def put(self, packed: bytes) -> None:
        if self.lost:  # by what a client has done on hearing another stream's piece of the same turn
            return
        self._unread += packed
        if self._exchange.reading.is_set():
            self.read()
        elif len(self._unread) > HIGH_WATER and not self.paused:
            self.note_paused()

    def read(self) -> None:
        """The client takes what there is."""
        body, self._unread = bytes(self._unread), bytearray()
        if body and not self._exchange.gone:
            self._exchange.came(body)
        if self.paused:
            self.note_resumed()

    def abort(self) -> None:
        self._exchange.cut()

    async def close(self) -> None:
        self.unwatch()


class Exchange:
    """One request and its answer. `came` is called with pieces of the body, in the gateway's turn of the loop."""

    def __init__(self, gateway: SimulatedGateway, request: ClientRequest, came: Callable[[bytes], None]) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.whole = False  # the answer's last byte has come
        self.reading = asyncio.Event()
        self.reading.set()
        self.over = asyncio.Event()
        self.came = came
        self._gateway = gateway
        self._request = request
        self._asked = False
        self._gone = asyncio.Event()
        self._socket = SimulatedSocket(self) if request.direct else None

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def begin(self) -> None:
        self._gateway.spawn(self._served(), f"http-{self._request.label}")

    async def _served(self) -> None:
        try:
            await self._gateway.app(self._scope(), self._receive, self._send)
        finally:
            self.over.set()

    # -- what the client does --------------------------------------------------------------------------------

    def leave(self) -> None:
        """Close the connection. The gateway's process hears of it when it runs."""
        with acting_as(self._gateway.name):
            asyncio.get_running_loop().call_soon(self.cut)

    def pause(self) -> None:
        self.reading.clear()

    def resume(self) -> None:
        self.reading.set()
        if self._socket is not None and not self._gone.is_set():
            with acting_as(self._gateway.name):
                asyncio.get_running_loop().call_soon(self._socket.read)

    async def read_out(self) -> None:
        """The server is done, or dead: read what is left."""
        await self.reading.wait()
        if self._socket is not None and not self._gone.is_set():
            self._socket.read()
        self._gone.set()

    # -- what the server does --------------------------------------------------------------------------------

    def cut(self) -> None:
        """The connection has ended, at either side."""
        self._gone.set()
        self.reading.set()
        if self._socket is not None:
            self._socket.note_lost()

    def _scope(self) -> dict[str, Any]:
        extensions = {} if self._socket is None else {EXTENSION: self._socket}
        return {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": self._request.path,
            "headers": [(b"x-request-id", self._request.label.encode()), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "extensions": extensions,
        }

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._request.body(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reading.wait()
        if self._gone.is_set():
            return  # as uvicorn does
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        if message["body"]:
            self.came(message["body"])
        self.whole = not message.get("more_body", False)


@dataclass(eq=False)
class Call:
    """One request of a client and what becomes of it."""

    request: ClientRequest
    make_checks: Callable[[ClientRequest], list[Check]]
    gateway: SimulatedGateway | None = None
    checks: list[Check] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)  # by choice
    outcome: str = "open"  # then ok, left, or an error's code
    refusals: int = 0  # 429s and 503s before its answer began
    deaths: int = 0  # gateways that died under it
    num_events: int = 0
    wrong: str = ""
    exchange: Exchange | None = None
    has_left: bool = False
    has_paused: bool = False
    usage: dict[str, Any] | None = None
    _buffer: bytearray = field(default_factory=bytearray)
    _error: str = ""
    _done: bool = False
    _echoed: set[int] = field(default_factory=set)  # choices that have begun with their prompt

    @property
    def tokens(self) -> list[int]:
        """Of its first choice, as far as its gateway knows them."""
        return self.checks[0].tokens if self.checks else []

    async def serve(self, next_gateway: Callable[[], Coroutine[Any, Any, SimulatedGateway]]) -> str:
        """Until it is answered, or given up."""
        leaving = None
        if self.request.leaves_after is not None:
            leaving = asyncio.get_running_loop().call_later(self.request.leaves_after, self.leave)
        try:
            while True:
                gateway = self.gateway = await next_gateway()
                self._begin_anew()
                exchange = self.exchange = Exchange(gateway, self.request, self._came)
                exchange.begin()
                await exchange.over.wait()
                await exchange.read_out()
                if self.wrong:
                    return "wrong"
                if self.has_left:
                    return "left"
                if not gateway.alive:
                    self.deaths += 1
                elif exchange.status in (429, 503):
                    self.refusals += 1
                    await asyncio.sleep(RETRY_AFTER_S)
                elif self._error == SHUTTING_DOWN:
                    self.deaths += 1
                else:
                    return self._verdict(exchange)
                if self.has_left:
                    return "left"
        finally:
            if leaving is not None:
                leaving.cancel()

    def leave(self) -> None:
        self.has_left = True
        if self.exchange is not None:
            self.exchange.leave()

    def pause(self) -> None:
        """Read nothing more for now."""
        self.has_paused = True
        if self.exchange is not None:
            self.exchange.pause()

    def _begin_anew(self) -> None:
        self.checks = self.make_checks(self.request)
        self.reasons.clear()
        self._buffer.clear()
        self._error, self._done, self.usage = "", False, None
        self._echoed.clear()

    def _came(self, body: bytes) -> None:
        """Bytes of the answer. What is wrong is kept: it must not be raised inside the gateway."""
        with acting_as(CLIENTS):
            try:
                self._take(body)
            except WrongAnswer as error:
                self.wrong = self.wrong or f"request {self.request.number}: {error}"
                if self.exchange is not None:
                    self.exchange.leave()

    def _take(self, body: bytes) -> None:
        self._buffer += body
        if not self.request.stream or (self.exchange is not None and self.exchange.status != 200):
            return
        while (end := self._buffer.find(b"\n\n")) >= 0:
            event = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            if event.startswith(b"data: "):
                self._event(event[6:])
        request = self.request
        if request.stops_reading_at is not None and self.num_events > request.stops_reading_at and self.exchange:
            self.pause()
            asyncio.get_running_loop().call_later(request.pause_s, self.exchange.resume)
            self.request = replace_pause(request)

    def _event(self, payload: bytes) -> None:
        self.num_events += 1
        if self._done:
            raise WrongAnswer("an event after the last one")
        if payload == b"[DONE]":
            self._done = True
            return
        answer = json.loads(payload)
        if "error" in answer:
            self._error = str(answer["error"]["code"])
            return
        for choice in answer["choices"]:
            delta = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            self._choice(choice, delta)
        self.usage = answer.get("usage") or self.usage

    def _choice(self, choice: dict[str, Any], text: str) -> None:
        index, logprobs = choice["index"], _logprobs(choice)
        if index in self.reasons:
            raise WrongAnswer(f"choice {index} goes on after its end")
        check = self.checks[index]
        if self.request.echo and index not in self._echoed:
            self._echoed.add(index)
            if not text.startswith(self.request.echoed):
                raise WrongAnswer(f"an answer that begins with {text!r} instead of {self.request.echoed!r}")
            text = text.removeprefix(self.request.echoed)
            size = len(self.request.prompt)
            check_prompt([entry["logprob"] for entry in logprobs[:size]], self.request)
            logprobs = logprobs[size:]
        check.take(text, choice.get("token_ids") if self.request.wants_ids else None, logprobs)
        if choice["finish_reason"] is not None:
            self.reasons[index] = choice["finish_reason"]
            check.end(choice["finish_reason"])

    def _verdict(self, exchange: Exchange) -> str:
        """Of an exchange that is over, while its gateway lives."""
        if exchange.status != 200:
            return str(json.loads(self._buffer)["error"]["code"]) if self._buffer else "cut off"
        if not exchange.whole:
            return "cut off"
        if self._error:
            return self._error
        try:
            if not self.request.stream:
                self._whole_answer(json.loads(self._buffer))
            elif not self._done:
                raise WrongAnswer("ended without [DONE]")
            if sorted(self.reasons) != list(range(self.request.n)):
                raise WrongAnswer(f"choices {sorted(self.reasons)} of {self.request.n}")
            num_tokens = sum(check.num_tokens for check in self.checks)
            if self.usage is None or self.usage["completion_tokens"] != num_tokens:
                raise WrongAnswer(f"usage {self.usage} for {num_tokens} tokens")
        except WrongAnswer as error:
            self.wrong = f"request {self.request.number}: {error}"
            return "wrong"
        return "ok"

    def _whole_answer(self, answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            self._choice(choice, choice["message"]["content"] if "message" in choice else choice["text"])
            if self.request.num_prompt_top is not None:
                told = answer["prompt_logprobs"] if "message" in choice else choice["prompt_logprobs"]
                check_entries(told, self.request)
        self.usage = answer["usage"]


def replace_pause(request: ClientRequest) -> ClientRequest:
    """The same request, of a client that does not stop again."""
    return replace(request, stops_reading_at=None)


def check_entries(told: list[dict[str, Any] | None], request: ClientRequest) -> None:
    """vLLM's form of a prompt's log-probabilities. Raises `WrongAnswer`."""
    tokens = [str(token) for token in request.prompt]
    if len(told) != len(tokens):
        raise WrongAnswer(f"{len(told)} entries of a prompt of {len(tokens)} tokens")
    check_prompt([entry and entry[token]["logprob"] for token, entry in zip(tokens, told, strict=True)], request)


def check_prompt(found: list[float | None], request: ClientRequest) -> None:
    """Raises `WrongAnswer`."""
    wanted = (None, *request.prompt_logprobs)
    for place, (told, right) in enumerate(zip(found, wanted, strict=True)):
        if (told is None) != (right is None) or (told and right and abs(told - right) > LOGPROB_TOLERANCE):
            raise WrongAnswer(f"log-probability {told} of the prompt's token {place} instead of {right}")


def _logprobs(choice: dict[str, Any]) -> list[dict[str, Any]]:
    told = choice["logprobs"]
    if told is None:
        return []
    if "content" in told:
        return list(told["content"])
    return [{"logprob": logprob} for logprob in told["token_logprobs"]]
