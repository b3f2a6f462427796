"""The JSON around generated text: one object for a whole answer, chunks for a stream.

Everything that does not depend on the token is encoded once per answer. Text comes in as bytes that are
escaped for a JSON string already (`kvferry.text.detokenizer.TokenTexts.escaped`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

FinishReason = Literal["stop", "length"]

DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": keep-alive\n\n"
_HOLE: Final = "\x00"  # stands for the text while the pieces around it are encoded


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(payload: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + payload + b"\n\n"


class Answer(ABC):
    """One request's answer in one of the API's two forms."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, answer_id: str, model: str, created: int, *, include_usage: bool) -> None:
        self.id = answer_id
        self._model = model
        self._created = created
        # With usage asked for, every chunk but the last says that it has none.
        self._no_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        before, after = self._chunk(self._text_choice(_HOLE, None)).split(_encode(_HOLE)[1:-1])
        self.event_head = b"data: " + before
        self.event_tail = after + b"\n\n"

    @abstractmethod
    def first_event(self) -> bytes:
        """What a stream begins with; may be empty."""

    @abstractmethod
    def _text_choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """The choice of a chunk."""

    @abstractmethod
    def _last_choice(self, reason: FinishReason) -> dict[str, Any]:
        """The choice of the chunk that tells why the stream ended."""

    @abstractmethod
    def _whole_choice(self, reason: FinishReason) -> dict[str, Any]:
        """The choice of a whole answer, with `_HOLE` as its text."""

    def last_events(self, reason: FinishReason, usage: Usage | None) -> bytes:
        """What a stream ends with; `usage` only if it was asked for."""
        events = sse(self._chunk(self._last_choice(reason)))
        if usage is not None:
            events += sse(_encode({**self._frame(self.chunk_object), "choices": [], "usage": usage.as_dict()}))
        return events + DONE

    def whole(self, text: bytes, reason: FinishReason, usage: Usage) -> bytes:
        """The body of an answer that is not streamed. `text` is escaped."""
        fields = {
            **self._frame(self.whole_object),
            "choices": [self._whole_choice(reason)],
            "usage": usage.as_dict(),
        }
        before, after = _encode(fields).split(_encode(_HOLE)[1:-1])
        return before + text + after

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return _encode({**self._frame(self.chunk_object), "choices": [choice], **self._no_usage})


class ChatAnswer(Answer):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_event(self) -> bytes:
        return sse(self._chunk(self._delta({"role": "assistant", "content": ""}, None)))

    def _delta(self, delta: dict[str, str], reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _text_choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return self._delta({"content": text}, reason)

    def _last_choice(self, reason: FinishReason) -> dict[str, Any]:
        return self._delta({}, reason)

    def _whole_choice(self, reason: FinishReason) -> dict[str, Any]:
        message = {"role": "assistant", "content": _HOLE, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}


class TextAnswer(Answer):
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def first_event(self) -> bytes:
        return b""

    def _text_choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def _last_choice(self, reason: FinishReason) -> dict[str, Any]:
        return self._text_choice("", reason)

    def _whole_choice(self, reason: FinishReason) -> dict[str, Any]:
        return self._text_choice(_HOLE, reason)
