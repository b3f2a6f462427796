"""One streamed request to an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from kvferry.errors import SettingError
from kvferry.runtime import blocking_clock
from kvferry_local.bench.sse import data_events, read_body, read_head

MAX_LINE_BYTES: Final = 1 << 22
MAX_DETAIL_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    path: str  # of /v1, without an end
    api_key: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: str, api_key: str, tls: ssl.SSLContext | None = None) -> Endpoint:
        """`tls`: whom to trust, instead of the system's authorities.

        Raises `SettingError` for what is no http or https URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            raise SettingError("--url", f"{url!r} is no http or https URL") from None
        if not parts.hostname:
            raise SettingError("--url", f"{url!r} names no host")
        path = parts.path.rstrip("/")
        context = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        return cls(parts.hostname, port, context, path if path.endswith("/v1") else f"{path}/v1", api_key)

    def head(self, method: str, path: str, length: int) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        return (
            f"{method} {self.path}{path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n{key}Connection: close\r\n"
            f"Accept: */*\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=MAX_LINE_BYTES)


@dataclass(slots=True)
class Outcome:
    """What came of one request. Times are seconds of one clock."""

    due: float  # when it should have been sent
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of events with text
    ended: float = 0.0
    prompt_tokens: int = 0  # as the server counted them
    output_tokens: int = 0
    error: str = ""  # empty: a whole answer
    detail: str = ""

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        """Mean time of an output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.output_tokens - 1)


class ServerError(Exception):
    """`kind` is what such errors are counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


async def ask(endpoint: Endpoint, path: str, body: dict[str, Any], due: float, timeout: float) -> Outcome:
    """POST a streaming request and read it to its end. Never raises but for being cancelled."""
    outcome = Outcome(due)
    try:
        async with asyncio.timeout(timeout):
            await _stream(endpoint, path, body, outcome)
    except ServerError as error:
        outcome.error, outcome.detail = error.kind, str(error)
    except TimeoutError:
        outcome.error = "timeout"
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        outcome.error, outcome.detail = "connection", str(error) or type(error).__name__
    except (ValueError, KeyError, TypeError) as error:
        outcome.error, outcome.detail = "malformed", str(error)
    if not outcome.error and not outcome.arrivals:
        outcome.error = "empty"
    outcome.detail = outcome.detail[:MAX_DETAIL_CHARS]
    outcome.ended = blocking_clock()
    return outcome


async def _stream(endpoint: Endpoint, path: str, body: dict[str, Any], outcome: Outcome) -> None:
    document = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    outcome.sent = blocking_clock()
    reader, writer = await endpoint.connect()
    try:
        writer.write(endpoint.head("POST", path, len(document)) + document)
        status, headers = await read_head(reader)
        if status != 200:
            answer = await read_body(reader, headers)
            raise ServerError(f"HTTP {status}", answer.decode(errors="replace"))
        done = False
        async for moment, event in data_events(reader, headers):
            if event == b"[DONE]":
                done = True
            else:
                _take(outcome, moment, json.loads(event))
        if not done:
            raise ServerError("cut short", "the stream ended without [DONE]")
    finally:
        writer.close()
    if not outcome.output_tokens:  # a server without usage in streams
        outcome.output_tokens = len(outcome.arrivals)


def _take(outcome: Outcome, moment: float, event: dict[str, Any]) -> None:
    if error := event.get("error"):
        raise ServerError("stream error", str(error))
    if usage := event.get("usage"):
        outcome.prompt_tokens, outcome.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            outcome.arrivals.append(moment)


async def first_model(endpoint: Endpoint, timeout: float) -> str:
    """The name of the first model that the server lists. Raises `ServerError`, OSError, TimeoutError."""
    async with asyncio.timeout(timeout):
        reader, writer = await endpoint.connect()
        try:
            writer.write(endpoint.head("GET", "/models", 0))
            status, headers = await read_head(reader)
            answer = await read_body(reader, headers)
        finally:
            writer.close()
    try:
        return str(json.loads(answer)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ServerError(f"HTTP {status}", answer.decode(errors="replace")[:MAX_DETAIL_CHARS]) from None
