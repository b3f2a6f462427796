"""The answer of `/v1/responses`: a `response` object, or the events of its stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvferry_gateway.answers.answer import Answer, FinishReason, Usage, WholeChoice, encode
from kvferry_gateway.answers.logprobs import ToldToken, chat_logprobs
from kvferry_gateway.answers.prompt_logprobs import NOTHING_TOLD, PromptTold
from kvferry_gateway.errors import ApiError
from kvferry_gateway.parsing.parts import Content, Part
from kvferry_gateway.requests.responses import ResponsesRequest
from kvferry_gateway.responses.output import Event, Output, Status

INCOMPLETE = {"reason": "max_output_tokens"}


class ResponseAnswer(Answer):
    """Its events are numbered, and the last ones repeat what went before: each goes through `told_event`."""

    id_prefix = "resp_"
    told_in_parts = True
    opens_at_once = True

    def __init__(self, request: ResponsesRequest, *about: Any, **options: Any) -> None:
        super().__init__(*about, **options)
        self._request = request
        self._output = Output(self.id)
        self._num_events = 0
        self._status: Status = "completed"

    def first_event(self, index: int, echo: str, prompt_ids: Sequence[int], prompt: PromptTold = NOTHING_TOLD) -> bytes:
        return self._events([])

    def told_event(self, index: int, parts: Sequence[Part], told: Sequence[ToldToken]) -> bytes:
        return self._events(self._push(parts, told))

    def last_event(self, index: int, reason: FinishReason) -> bytes:
        return self._events(self._close(reason))

    def end(self, usage: Usage | None) -> bytes:
        return self._events([{"type": f"response.{self._status}", "response": self._response(self._status, usage)}])

    def failed(self, error: ApiError) -> bytes:
        events = list(self._output.close("incomplete"))
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = {**self._response("failed"), "error": {"code": code, "message": error.message}}
        return self._events([*events, {"type": "response.failed", "response": response}])

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> bytes:
        (choice,) = choices
        self._push(choice.parts, choice.told)
        self._close(choice.reason)
        return encode(self._response(self._status, usage))

    def _push(self, parts: Sequence[Part], told: Sequence[ToldToken]) -> list[Event]:
        logprobs = self._entries(told)
        events: list[Event] = []
        for part in parts:
            if isinstance(part, Content):
                events += self._output.push(part, logprobs)
                logprobs = []
            else:
                events += self._output.push(part)
        return events

    def _close(self, reason: FinishReason) -> list[Event]:
        if reason == "length":
            self._status = "incomplete"
        return list(self._output.close(self._status))

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        request = self._request
        format_ = None if request.text is None else request.text.format
        shown = {"type": "text"} if format_ is None else format_.model_dump(exclude_none=True, by_alias=True)
        choice = request.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": INCOMPLETE if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self._model,
            "output": list(self._output.items),
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": shown},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
            "tools": [tool.model_dump() for tool in request.tools],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": request.user,
            "metadata": request.metadata or {},
            "system_fingerprint": self._fingerprint,
        }

    def _events(self, events: Iterable[Event]) -> bytes:
        written = []
        if self._num_events == 0:  # tokens may come before the stream is begun
            response = {**self._response("in_progress"), "output": []}
            first = [{"type": f"response.{name}", "response": response} for name in ("created", "in_progress")]
            events = [*first, *events]
        for event in events:
            body = encode({**event, "sequence_number": self._num_events})
            written.append(b"event: " + event["type"].encode() + b"\ndata: " + body + b"\n\n")
            self._num_events += 1
        return b"".join(written)

    def _entries(self, told: Sequence[ToldToken]) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = chat_logprobs(told, self.texts)["content"] if self.details.logprobs else []
        return entries


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.total_tokens,
    }
