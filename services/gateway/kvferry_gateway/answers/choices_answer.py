"""What the answers of chats and completions have in common. What does not depend on the token is encoded once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from kvferry_gateway.answers.answer import DONE, Answer, FinishReason, Usage, WholeChoice, encode, sse
from kvferry_gateway.answers.logprobs import ToldToken
from kvferry_gateway.errors import ApiError
from kvferry_gateway.parsing.parts import Content, Part

HOLE: Final = "\x00"  # stands for a part that is encoded already, while the pieces around it are


class ChoicesAnswer(Answer):
    """`choices`, each with an index: what chats and completions have in common."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def event_frame(self, index: int) -> tuple[bytes, bytes]:
        before, after = self._chunk(self._text_choice(index, HOLE, None)).split(encode(HOLE)[1:-1])
        return b"data: " + before, after + b"\n\n"

    def told_event(self, index: int, parts: Sequence[Part], told: Sequence[ToldToken]) -> bytes:
        if not parts and not self.details:
            return b""
        self._num_told[index] += len(told)
        choices = [self._part_choice(index, part) for part in parts or [Content("")]]
        choices[0] |= self._details_of(told)
        return b"".join(sse(self._chunk(choice)) for choice in choices)

    @abstractmethod
    def _text_choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """The choice of a chunk."""

    def _part_choice(self, index: int, part: Part) -> dict[str, Any]:
        """The choice of a chunk that tells a part."""
        assert isinstance(part, Content), "only chats have others"
        return self._text_choice(index, part.text, None)

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
        return sse(self._chunk(self._last_choice(index, reason)))

    def failed(self, error: ApiError) -> bytes:
        return sse(error.body) + DONE

    def end(self, usage: Usage | None) -> bytes:
        if usage is None:
            return DONE
        return sse(encode({**self._frame(self.chunk_object), "choices": [], "usage": usage.as_dict()})) + DONE

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        encoded = b",".join(self._encoded_choice(index, choice) for index, choice in enumerate(choices))
        head, tail = encode(self._frame(self.whole_object)), encode({"usage": usage.as_dict()})
        return head[:-1] + b',"choices":[' + encoded + b"]," + tail[1:]

    def _encoded_choice(self, index: int, choice: WholeChoice) -> bytes:
        return encode(self._whole_choice(index, choice))

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

    def _chunk(self, choice: dict[str, Any], *, is_first: bool = False, **fields: Any) -> bytes:
        return encode({
            **self._frame(self.chunk_object), "choices": [choice], **fields, **self._counts(choice["index"], is_first)
        })  # fmt: skip

    def _counts(self, index: int, is_first: bool) -> dict[str, Any]:
        """The usage of a chunk of a choice."""
        if self.details.counts:
            usage = Usage(self.prompt_sizes[index], 0 if is_first else self._num_told[index])
            return {"usage": usage.as_dict()}
        # With usage asked for, every chunk but the last says that it has none.
        return {"usage": None} if self._include_usage else {}
