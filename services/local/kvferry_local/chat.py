"""`kvferry chat`: a conversation with a running stack, streamed over server-sent events."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from kvferry_local.client import RequestFailed, Target, check, request_errors
from kvferry_local.settings import ClientSettings

PROMPT: Final = "> "
# Between two reads: the gateway breaks its silence every 15 s.
STREAM_TIMEOUT: Final = httpx.Timeout(60.0, connect=5.0)

Message = dict[str, str]
Answer = Generator[str, None, None]


@dataclass(slots=True)
class Conversation:
    """The turns so far. An answer that was interrupted is kept as far as it came."""

    http: httpx.Client
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def ask(self, question: str) -> Answer:
        """Pieces of the answer. Closing the iterator closes the connection, which cancels the request."""
        self.messages.append({"role": "user", "content": question})
        body = {"model": self.model, "messages": self.messages, "stream": True, **self.options}
        answer: list[str] = []
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                    check(response)
                for piece in pieces(response.iter_lines()):
                    answer.append(piece)
                    yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()  # the question stays unanswered: ask it anew


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """Text of a chat completion's SSE lines. Raises `RequestFailed` for an error event."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # comments keep the connection alive
        payload = line[5:].strip()
        if payload == "[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise RequestFailed(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield text


def run_chat(
    target: Target, settings: ClientSettings, model: str | None, prompt: str | None, options: dict[str, Any]
) -> None:
    """One answer for `prompt`, or a conversation read from the terminal. Raises `RequestFailed`."""
    with target.open(settings, STREAM_TIMEOUT) as http, request_errors(target.url):
        conversation = Conversation(http, model or target.model or first_model(http), options)
        if prompt is not None:
            show(conversation.ask(prompt))
            return
        sys.stderr.write(f"{conversation.model} on {target.url}. Ctrl-C stops an answer, Ctrl-D ends.\n")
        while (question := read_question()) is not None:
            if question:
                show_interruptibly(conversation.ask(question))


def first_model(http: httpx.Client) -> str:
    response = http.get("/v1/models")
    check(response)
    models = response.json()["data"]
    if not models:
        raise RequestFailed("the gateway serves no model")
    return str(models[0]["id"])


def read_question() -> str | None:
    """None at the end of input."""
    try:
        return input(PROMPT if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return ""


def show(answer: Answer) -> None:
    with closing(answer):  # Ctrl-C while we write: the request ends now, not when the garbage is collected
        for piece in answer:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


def show_interruptibly(answer: Answer) -> None:
    try:
        show(answer)
    except KeyboardInterrupt:
        sys.stdout.write(" …\n")
    except RequestFailed as error:
        sys.stderr.write(f"kvferry: {error}\n")
