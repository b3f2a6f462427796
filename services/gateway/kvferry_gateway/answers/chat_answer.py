"""A chat's answer: `chat.completion` and its chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from kvferry_gateway.answers.answer import FinishReason, Usage, WholeChoice, encode, sse
from kvferry_gateway.answers.choices_answer import ChoicesAnswer
from kvferry_gateway.answers.logprobs import ToldToken, chat_logprobs
from kvferry_gateway.answers.prompt_logprobs import NOTHING_TOLD, PromptTold
from kvferry_gateway.parsing.parts import CallArguments, CallStart, Content, Message, Part, Reasoning


def call_id_of(answer_id: str, index: int, number: int) -> str:
    """Of a choice's call. Nine letters and digits: all that Mistral's templates take back."""
    return hashlib.sha256(f"{answer_id} {index} {number}".encode()).hexdigest()[:9]


class ChatAnswer(ChoicesAnswer):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_event(self, index: int, echo: str, prompt_ids: Sequence[int], prompt: PromptTold = NOTHING_TOLD) -> bytes:
        fields = {"prompt_token_ids": list(prompt_ids)} if self.details.token_ids else {}
        return sse(self._chunk(self._delta(index, {"role": "assistant", "content": ""}, None), is_first=True, **fields))

    def _delta(self, index: int, delta: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _text_choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return self._delta(index, {"content": text}, reason)

    def _part_choice(self, index: int, part: Part) -> dict[str, Any]:
        match part:
            case Content(text):
                delta: dict[str, Any] = {"content": text}
            case Reasoning(text):
                delta = {"reasoning_content": text}
            case CallStart(number, name):
                call = {"index": number, **self._call(index, number, name, "")}
                delta = {"tool_calls": [call]}
            case CallArguments(number, text):
                delta = {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
        return self._delta(index, delta, None)

    def _call(self, index: int, number: int, name: str, arguments: str) -> dict[str, Any]:
        call_id = call_id_of(self.id, index, number)
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _last_choice(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return self._delta(index, {}, reason)

    def _whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        told = Message.of(choice.parts)
        message: dict[str, Any] = {"role": "assistant", "content": told.content, "refusal": None}
        if told.reasoning:
            message["reasoning_content"] = told.reasoning
        if told.calls:
            message["content"] = told.content or None
            calls = enumerate(told.calls)
            message["tool_calls"] = [self._call(index, number, call.name, call.arguments) for number, call in calls]
        made = {"index": index, "message": message, "logprobs": None, "finish_reason": choice.reason}
        return {**made, **self._details_of(choice.told)}

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        body = super().whole(choices, usage)
        if self.details.token_ids:
            body = body[:-1] + b',"prompt_token_ids":' + encode(list(choices[0].prompt_ids)) + b"}"
        if (entries := choices[0].prompt.entries) is not None:
            body = body[:-1] + b',"prompt_logprobs":' + entries + b"}"
        return body

    def _logprobs_of(self, told: Sequence[ToldToken]) -> dict[str, Any]:
        return chat_logprobs(told, self.texts)
