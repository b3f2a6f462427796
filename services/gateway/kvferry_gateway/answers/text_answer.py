"""A completion's answer: `text_completion`, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvferry_gateway.answers.answer import FinishReason, WholeChoice, encode, sse
from kvferry_gateway.answers.choices_answer import HOLE, ChoicesAnswer
from kvferry_gateway.answers.logprobs import ToldToken, text_logprobs
from kvferry_gateway.answers.prompt_logprobs import NOTHING_TOLD, PromptTold, encoded_columns
from kvferry_gateway.parsing.parts import Message


class TextAnswer(ChoicesAnswer):
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def first_event(self, index: int, echo: str, prompt_ids: Sequence[int], prompt: PromptTold = NOTHING_TOLD) -> bytes:
        if not echo and not self.details.token_ids:
            return b""
        choice = self._text_choice(index, echo, None)
        if self.details.token_ids:
            choice["prompt_token_ids"], choice["token_ids"] = list(prompt_ids), []
        if prompt.echoed is None:
            return sse(self._chunk(choice, is_first=True))
        choice["logprobs"] = HOLE
        before, _, after = self._chunk(choice, is_first=True).rpartition(encode(HOLE))
        return sse(before + encoded_columns(prompt.echoed, (), self.texts) + after)

    def _text_choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _last_choice(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return self._text_choice(index, "", reason)

    def _whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        made = {
            **self._text_choice(index, Message.of(choice.parts).content, choice.reason),
            **self._details_of(choice.told),
        }
        if self.details.token_ids:
            made["prompt_token_ids"] = list(choice.prompt_ids)
        return made

    def _encoded_choice(self, index: int, choice: WholeChoice) -> bytes:
        made, behind = self._whole_choice(index, choice), b""
        if (echoed := choice.prompt.echoed) is not None:
            del made["logprobs"]
            behind += b',"logprobs":' + encoded_columns(echoed, choice.told, self.texts)
        if (entries := choice.prompt.entries) is not None:
            behind += b',"prompt_logprobs":' + entries
        return encode(made)[:-1] + behind + b"}"

    def _logprobs_of(self, told: Sequence[ToldToken]) -> dict[str, Any]:
        return text_logprobs(told, self.texts)
