"""The JSON around generated text: one object for a whole answer, events for a stream."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from kvferry.text.detokenizer import TokenTexts
from kvferry_gateway.answers.logprobs import ToldToken
from kvferry_gateway.answers.prompt_logprobs import NOTHING_TOLD, PromptTold
from kvferry_gateway.errors import ApiError
from kvferry_gateway.parsing.parts import Part

FinishReason = Literal["stop", "length", "tool_calls"]

DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None  # None: not known yet
    reasoning_tokens: int | None = None  # None: the model doesn't think

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }
        if self.cached_tokens is not None:
            counts["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        if self.reasoning_tokens is not None:
            counts["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return counts


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(payload: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + payload + b"\n\n"


@dataclass(frozen=True, slots=True)
class Details:
    """What an answer tells besides text."""

    logprobs: bool = False
    token_ids: bool = False
    num_prompt_top: int | None = None  # best tokens beside each one of the prompt; None: `prompt_logprobs` has none
    num_echoed_top: int | None = None  # the same, of a prompt that is echoed with `logprobs`
    counts: bool = False  # each event has the token counts so far

    def __bool__(self) -> bool:
        """Whether events tell more than text."""
        return self.logprobs or self.token_ids or self.counts


@dataclass(frozen=True, slots=True)
class WholeChoice:
    """One complete choice of an answer that is not streamed."""

    parts: Sequence[Part]
    reason: FinishReason
    told: Sequence[ToldToken] = ()
    prompt_ids: Sequence[int] = ()
    prompt: PromptTold = NOTHING_TOLD


class Answer(ABC):
    """One request's answer in one of the API's forms."""

    id_prefix: ClassVar[str]
    told_in_parts: ClassVar[bool] = False  # no two events are alike but for their text
    opens_at_once: ClassVar[bool] = False  # the first event tells that the request runs, not that its tokens come

    def __init__(
        self, random_id: str, model: str, created: int, texts: TokenTexts, *, include_usage: bool, details: Details
    ) -> None:
        """`created`: Unix seconds. `include_usage`: the end of a stream will be told it."""
        self.id: Final = self.id_prefix + random_id
        self.details: Final = details
        self.texts: Final = texts
        self.prompt_sizes: Final[dict[int, int]] = {}  # tokens of the prompt, by choice
        self._num_told: Final = Counter[int]()  # tokens in events with details, by choice
        self._model = model
        self._created = created
        self._include_usage = include_usage
        self._fingerprint: str | None = None
        self._fingerprint_of: int | None = None  # the choice that it came from

    def placed(self, index: int, numerics_id: str) -> None:
        """Where a choice is computed: the first one's is the whole answer's fingerprint."""
        if self._fingerprint_of is None or self._fingerprint_of == index:
            self._fingerprint_of, self._fingerprint = index, numerics_id

    def event_frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after a text in an event of a choice, unless each is `told_event`'s. The text must
        be escaped for JSON."""
        return b"", b""

    @abstractmethod
    def first_event(self, index: int, echo: str, prompt_ids: Sequence[int], prompt: PromptTold = NOTHING_TOLD) -> bytes:
        """What a choice's stream begins with; may be empty."""

    @abstractmethod
    def told_event(self, index: int, parts: Sequence[Part], told: Sequence[ToldToken]) -> bytes:
        """Events with details, one for each part; the tokens are told with the first one. Without a part: the last
        tokens, which have no text."""

    @abstractmethod
    def last_event(self, index: int, reason: FinishReason) -> bytes:
        """What a choice's stream ends with."""

    @abstractmethod
    def end(self, usage: Usage | None) -> bytes:
        """What ends the whole answer, after its last choice; `usage` only if it was asked for."""

    @abstractmethod
    def failed(self, error: ApiError) -> bytes:
        """What ends a stream that an error has ended."""

    @abstractmethod
    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
