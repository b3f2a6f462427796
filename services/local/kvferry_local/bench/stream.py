"""One streamed answer, with the time at which each of its events arrived. One connection for each request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import Endpoint, Refused, ServerError
from kvferry_local.bench.sse import data_events, read_body, read_head


@dataclass(slots=True)
class Stream:
    """What came back. Times are seconds of one monotonic clock."""

    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of events with text
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # where the request asked for them
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    ended: float = 0.0
    connection: asyncio.StreamWriter | None = None

    def take(self, moment: float, event: dict[str, Any]) -> bool:
        """Whether it brought text. Raises `ServerError` if it is an error's."""
        if error := event.get("error"):
            raise ServerError("stream error", str(error))
        self.usage = event.get("usage") or self.usage
        pieces = [self._take_choice(choice) for choice in event.get("choices") or []]
        self.arrivals += [moment for piece in pieces if piece]
        return any(pieces)

    def _take_choice(self, choice: dict[str, Any]) -> str:
        delta = choice.get("delta") or {}
        piece: str = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
        self.text += piece
        self.token_ids += choice.get("token_ids") or []
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return piece


async def stream(
    endpoint: Endpoint,
    path: str,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str] | None = None,
    into: Stream | None = None,
    on_text: Callable[[], None] | None = None,
) -> Stream:
    """POST a streaming request and read it to `[DONE]`.

    `into` is filled while tokens arrive, so that what came is known even if the caller cancels.
    Raises `ServerError`, OSError, asyncio.IncompleteReadError; ValueError, KeyError, TypeError of what is malformed.
    """
    document = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    answer = into if into is not None else Stream()
    answer.sent = blocking_clock()
    writer = None
    try:
        reader, writer = await endpoint.connect()
        answer.connection = writer
        writer.write(endpoint.head("POST", path, len(document), headers) + document)
        status, told = await read_head(reader)
        if status != 200:
            raise Refused(status, await read_body(reader, told))
        done = False
        async for moment, event in data_events(reader, told):
            if event == b"[DONE]":
                done = True
            elif answer.take(moment, json.loads(event)) and on_text is not None:
                on_text()
        if not done:
            raise ServerError("cut short", "the stream ended without [DONE]")
    finally:
        answer.ended = blocking_clock()
        if writer is not None:
            writer.close()
    return answer
