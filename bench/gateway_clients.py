"""Streaming clients for gateways: they note what came and when, and make sense of it only when all is over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvferry.runtime import blocking_clock

PATH: Final = "/v1/chat/completions"
STOPS: Final = ("### User:", "\n\nUser:", "Observation:", "</answer>")
PATIENCE_S: Final = 60.0
LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


class GatewayError(Exception):
    """An answer that no figure may be made of."""


def request(model: str, prompt: str, max_tokens: int, label: str) -> bytes:
    """A streamed chat with stop strings and usage, on a connection that is kept."""
    body = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "stream": True,
        "temperature": 0, "ignore_eos": True, "stop": list(STOPS), "stream_options": {"include_usage": True},
    }  # fmt: skip
    document = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nx-request-id: {label}\r\n"
        f"Content-Length: {len(document)}\r\n\r\n"
    )
    return head.encode() + document


@dataclass(slots=True)
class Answer:
    """What one request got. Times are of `blocking_clock`."""

    label: str
    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def ended(self) -> float:
        return self.pieces[-1][0]

    @property
    def num_bytes(self) -> int:
        return sum(len(piece) for _, piece in self.pieces)

    def arrivals(self) -> list[float]:
        """When each event with text came: when its last byte did. Raises `GatewayError`."""
        return [moment for moment, event in self._events() if _text(event)]

    def num_tokens(self) -> int:
        """By its usage. Raises `GatewayError`."""
        told = [event["usage"] for _, event in self._events() if event.get("usage")]
        if not told:
            raise GatewayError(f"{self.label}: no usage")
        return int(told[-1]["completion_tokens"])

    def _events(self) -> list[tuple[float, dict[str, Any]]]:
        found: list[tuple[float, dict[str, Any]]] = []
        rest = b""
        for moment, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise GatewayError(f"{self.label}: {event['error']}")
                    found.append((moment, event))
        return found


def _text(event: dict[str, Any]) -> str:
    choices = event["choices"]
    return (choices[0].get("delta", {}).get("content") or "") if choices else ""


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._tail = b""
        self._begun = self._over = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, port: int) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return client

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def ask(self, body: bytes, label: str) -> Answer:
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._begun, self._over = loop.create_future(), loop.create_future()
        self._answer = Answer(label, blocking_clock())
        self._transport.write(body)
        return self._answer

    async def begun(self) -> None:
        """Until some token has come."""
        await self._begun

    async def over(self) -> None:
        await self._over

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a TCP connection has no other
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        assert answer is not None, "nothing was asked"
        answer.pieces.append((blocking_clock(), data))
        if len(answer.pieces) == 1 and b" 200 " not in data[:16]:
            self._fail(GatewayError(data[-300:].decode(errors="replace")))
            return
        if not self._begun.done() and b'"content":"' in data:
            self._begun.set_result(None)
        self._tail = (self._tail + data[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK and not self._over.done():
            self._over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(GatewayError(f"the connection ended: {exc}"))

    def _fail(self, error: GatewayError) -> None:
        for future in (self._begun, self._over):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody need wait for it


class Clients:
    """Several connections to one server."""

    def __init__(self, clients: Sequence[Client], model: str, prompts: Sequence[str]) -> None:
        self._clients = clients
        self._model = model
        self._prompts = prompts
        self._num_asked = 0

    @classmethod
    async def open(cls, port: int, count: int, model: str, prompts: Sequence[str]) -> Clients:
        return cls([await Client.open(port) for _ in range(count)], model, prompts)

    def close(self) -> None:
        for client in self._clients:
            client.close()

    async def begin(self, max_tokens: int) -> list[Answer]:
        """One request on each connection. Returns when each has its first token."""
        answers = [self._ask(client, max_tokens) for client in self._clients]
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(client.begun() for client in self._clients))
        return answers

    async def end(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(client.over() for client in self._clients))

    async def one_after_the_other(self, count: int, max_tokens: int) -> list[Answer]:
        """`count` requests, on all connections at once, each connection asking again when it has its answer."""
        answers: list[Answer] = []

        async def ask_on(client: Client) -> None:
            while len(answers) < count:
                answers.append(self._ask(client, max_tokens))
                await client.over()

        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(ask_on(client) for client in self._clients))
        return answers

    def _ask(self, client: Client, max_tokens: int) -> Answer:
        self._num_asked += 1
        label = f"bench-{self._num_asked}"
        prompt = f"{self._num_asked:06d} {self._prompts[self._num_asked % len(self._prompts)]}"
        return client.ask(request(self._model, prompt, max_tokens, label), label)
