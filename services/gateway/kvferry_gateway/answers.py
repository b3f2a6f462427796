"""The JSON around generated text: one object for a whole answer, chunks for a stream.

Everything that does not depend on the token is encoded once per answer. Text comes in as bytes that are
escaped for a JSON string already (`kvferry.text.detokenizer.TokenTexts.escaped`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from kvferry.text.detokenizer import TokenTexts
from kvferry_gateway.logprobs import ToldToken, chat_logprobs, text_logprobs

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


@dataclass(frozen=True, slots=True)
class Details:
    """What an answer tells besides text."""

    logprobs: bool = False
    token_ids: bool = False

    def __bool__(self) -> bool:
        return self.logprobs or self.token_ids


NO_DETAILS: Final = Details()


@dataclass(frozen=True, slots=True)
class WholeChoice:
    """One complete choice of an answer that is not streamed."""

    text: str
    reason: FinishReason
    told: Sequence[ToldToken] = ()
    prompt_ids: Sequence[int] = ()


class Answer(ABC):
    """One request's answer in one of the API's two forms."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self,
        answer_id: str,
        model: str,
        created: int,
        texts: TokenTexts,
        *,
        include_usage: bool,
        details: Details = NO_DETAILS,
    ) -> None:
        self.id = answer_id
        self.details: Final = details
        self._model = model
        self._created = created
        self.texts: Final = texts
        self._fingerprint: str | None = None
        self._fingerprint_of: int | None = None  # the choice that it came from
        # With usage asked for, every chunk but the last says that it has none.
        self._no_usage: dict[str, Any] = {"usage": None} if include_usage else {}

    def placed(self, index: int, numerics_id: str) -> None:
        """Where a choice is computed: the first one's is the whole answer's fingerprint."""
        if self._fingerprint_of is None or self._fingerprint_of == index:
            self._fingerprint_of, self._fingerprint = index, numerics_id

    def event_frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after a text in an event of a choice. The text must be escaped for JSON."""
        before, after = self._chunk(self._text_choice(index, _HOLE, None)).split(_encode(_HOLE)[1:-1])
        return b"data: " + before, after + b"\n\n"

    def told_event(self, index: int, text: str, told: Sequence[ToldToken]) -> bytes:
        """An event with details."""
        return sse(self._chunk({**self._text_choice(index, text, None), **self._details_of(told)}))

    @abstractmethod
    def first_event(self, index: int, echo: str, prompt_ids: Sequence[int]) -> bytes:
        """What a choice's stream begins with; may be empty."""

    @abstractmethod
    def _text_choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """The choice of a chunk."""

    @abstractmethod
    def _last_choice(self, index: int, reason: FinishReason) -> dict[str, Any]:
        """The choice of the chunk that tells why the stream ended."""

    @abstractmethod
    def _whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        """One of the choices of a whole answer."""

    @abstractmethod
    def _logprobs_of(self, told: Sequence[ToldToken]) -> dict[str, Any]:
        """Log-probabilities in this form."""

    def last_event(self, index: int, reason: FinishReason) -> bytes:
        """What a choice's stream ends with."""
        return sse(self._chunk(self._last_choice(index, reason)))

    def end(self, usage: Usage | None) -> bytes:
        """What ends the whole answer, after its last choice; `usage` only if it was asked for."""
        if usage is None:
            return DONE
        return sse(_encode({**self._frame(self.chunk_object), "choices": [], "usage": usage.as_dict()})) + DONE

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        fields = {
            **self._frame(self.whole_object),
            "choices": [self._whole_choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage.as_dict(),
        }
        return _encode(fields)

    def _details_of(self, told: Sequence[ToldToken]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.details.logprobs:
            fields["logprobs"] = self._logprobs_of(told)
        if self.details.token_ids:
            fields["token_ids"] = [item.token for item in told]
        return fields

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(self, choice: dict[str, Any], **fields: Any) -> bytes:
        return _encode({**self._frame(self.chunk_object), "choices": [choice], **fields, **self._no_usage})


class ChatAnswer(Answer):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_event(self, index: int, echo: str, prompt_ids: Sequence[int]) -> bytes:
        fields = {"prompt_token_ids": list(prompt_ids)} if self.details.token_ids else {}
        return sse(self._chunk(self._delta(index, {"role": "assistant", "content": ""}, None), **fields))

    def _delta(self, index: int, delta: dict[str, str], reason: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _text_choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return self._delta(index, {"content": text}, reason)

    def _last_choice(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return self._delta(index, {}, reason)

    def _whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        made = {"index": index, "message": message, "logprobs": None, "finish_reason": choice.reason}
        return {**made, **self._details_of(choice.told)}

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        body = super().whole(choices, usage)
        if not self.details.token_ids:
            return body
        return body[:-1] + b',"prompt_token_ids":' + _encode(list(choices[0].prompt_ids)) + b"}"

    def _logprobs_of(self, told: Sequence[ToldToken]) -> dict[str, Any]:
        return chat_logprobs(told, self.texts)


class TextAnswer(Answer):
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def first_event(self, index: int, echo: str, prompt_ids: Sequence[int]) -> bytes:
        if not echo and not self.details.token_ids:
            return b""
        choice = self._text_choice(index, echo, None)
        if self.details.token_ids:
            choice["prompt_token_ids"], choice["token_ids"] = list(prompt_ids), []
        return sse(self._chunk(choice))

    def _text_choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _last_choice(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return self._text_choice(index, "", reason)

    def _whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        made = {**self._text_choice(index, choice.text, choice.reason), **self._details_of(choice.told)}
        if self.details.token_ids:
            made["prompt_token_ids"] = list(choice.prompt_ids)
        return made

    def _logprobs_of(self, told: Sequence[ToldToken]) -> dict[str, Any]:
        return text_logprobs(told, self.texts)
