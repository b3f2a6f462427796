"""The messages of a conversation, as chats and `/tokenize` take them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from kvferry_gateway.errors import bad_request
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.tools import MAX_TOOLS, FunctionName

MAX_LABEL_CHARS: Final = 512
MAX_CALL_ID_CHARS: Final = 128

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class CalledFunction(RequestModel):
    name: FunctionName
    arguments: str  # JSON text, as a model wrote it: it may be broken


class ToolCall(RequestModel):
    id: Annotated[str, Field(max_length=MAX_CALL_ID_CHARS)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves, so they get the object; broken JSON stays text."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(RequestModel):
    """`content` may be missing where an assistant called tools. `reasoning_content` is for templates that keep it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: Label | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=MAX_CALL_ID_CHARS)] | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """Text parts are joined by line breaks, as vLLM joins them."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    @property
    def num_chars(self) -> int:
        calls = sum(len(call.function.arguments) for call in self.tool_calls or ())
        return len(self.text) + len(self.reasoning_content or "") + calls

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        for field in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message

    def check(self, where: str) -> None:
        """Fields that belong to a role, as `where` in the request. Raises `ApiError` 400."""
        if self.tool_calls and self.role != "assistant":
            raise bad_request("Only an assistant's message has 'tool_calls'.", f"{where}.tool_calls", "invalid_value")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            problem = "A tool's message needs" if self.role == "tool" else "Only a tool's message has"
            raise bad_request(f"{problem} 'tool_call_id'.", f"{where}.tool_call_id", "invalid_value")
        if self.reasoning_content is not None and self.role != "assistant":
            param = f"{where}.reasoning_content"
            raise bad_request("Only an assistant's message has 'reasoning_content'.", param, "invalid_value")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            param = f"{where}.content"
            raise bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


Messages = Annotated[list[ChatMessage], Field(min_length=1)]
