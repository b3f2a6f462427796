"""A response's output items, as they grow, and the events that tell of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from kvferry_gateway.answers.chat_answer import call_id_of
from kvferry_gateway.parsing.parts import CallArguments, CallStart, Content, Part, Reasoning

Event = dict[str, Any]  # without its number
Status = Literal["completed", "incomplete"]


_TEXT: Final[dict[str, Any]] = {"type": "output_text", "annotations": []}
_PREFIXES: Final = {"message": "msg", "function_call": "fc", "reasoning": "rs"}


class Output:
    """Parts in, events out. `items` is what they add up to."""

    def __init__(self, response_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._response_id = response_id
        self._pieces: list[str] = []  # of the text of the item that is open
        self._logprobs: list[dict[str, Any]] = []  # of its tokens
        self._is_open = False

    def push(self, part: Part, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """`logprobs`: of the tokens that the part's text is made of, in a chat's form."""
        match part:
            case Content(text):
                yield from self._open_for("message")
                self._pieces.append(text)
                self._logprobs += logprobs
                yield self._event("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))
            case Reasoning(text):
                yield from self._open_for("reasoning")
                self._pieces.append(text)
                yield self._event("response.reasoning_text.delta", content_index=0, delta=text)
            case CallStart(number, name):
                yield from self.close("completed")
                call_id = call_id_of(self._response_id, 0, number)
                yield self._begin({"type": "function_call", "call_id": call_id, "name": name, "arguments": ""})
            case CallArguments(_, text):
                self._pieces.append(text)
                yield self._event("response.function_call_arguments.delta", delta=text)

    def close(self, status: Status) -> Iterator[Event]:
        """The item that is open has ended."""
        if not self._is_open:
            return
        self._is_open = False
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                yield self._event("response.function_call_arguments.done", arguments=text, name=item["name"])
            case "message":
                part = {**_TEXT, "text": text, "logprobs": self._logprobs}
                item["content"] = [part]
                yield self._event("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs)
                yield self._event("response.content_part.done", content_index=0, part=part)
            case "reasoning":
                part = {"type": "reasoning_text", "text": text}
                item["content"] = [part]
                yield self._event("response.reasoning_text.done", content_index=0, text=text)
                yield self._event("response.content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}

    def _open_for(self, kind: Literal["message", "reasoning"]) -> Iterator[Event]:
        if self._is_open and self.items[-1]["type"] == kind:
            return
        yield from self.close("completed")
        if kind == "message":
            yield self._begin({"type": "message", "role": "assistant", "content": []})
            part: dict[str, Any] = {**_TEXT, "text": "", "logprobs": []}
        else:
            yield self._begin({"type": "reasoning", "summary": [], "content": []})
            part = {"type": "reasoning_text", "text": ""}
        yield self._event("response.content_part.added", content_index=0, part=part)

    def _begin(self, item: dict[str, Any]) -> Event:
        number = len(self.items)
        random = hashlib.sha256(f"{self._response_id} item {number}".encode()).hexdigest()[:32]
        self.items.append({"id": f"{_PREFIXES[item['type']]}_{random}", **item, "status": "in_progress"})
        self._is_open = True
        self._pieces, self._logprobs = [], []
        return {"type": "response.output_item.added", "output_index": number, "item": dict(self.items[-1])}

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}
