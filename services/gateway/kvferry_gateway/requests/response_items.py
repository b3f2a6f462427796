"""The items of a response's input: what was said, called and returned so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from kvferry_gateway.requests.messages import MAX_CALL_ID_CHARS, CalledFunction, ChatMessage, Label, ToolCall
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.tools import FunctionName

MAX_ITEMS: Final = 4096
# Tags are no names of fields: errors leave them out.
_MESSAGE: Final = "<message>"

CallId = Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID_CHARS)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(RequestModel):
    """`output_text` is what earlier answers consist of; what was annotated or likely in them is passed over."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Texts = str | Annotated[list[InputText], Field(min_length=1)]


def _text_of(content: Texts) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class InputMessage(RequestModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts
    id: Label | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class InputCall(RequestModel):
    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str
    id: Label | None = None
    status: ItemStatus | None = None


class InputCallOutput(RequestModel):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Texts
    id: Label | None = None
    status: ItemStatus | None = None


class ReasoningText(RequestModel):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class InputReasoning(RequestModel):
    """What the model thought; the summary is for readers and goes to no model."""

    type: Literal["reasoning"]
    id: Label | None = None
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    status: ItemStatus | None = None


def _kind_of(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return f"<{kind}>"


InputItem = Annotated[
    Annotated[InputMessage, Tag(_MESSAGE)]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputCallOutput, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    Discriminator(_kind_of),
]
InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]


def messages_of(items: Iterable[InputMessage | InputCall | InputCallOutput | InputReasoning]) -> list[ChatMessage]:
    """A chat's messages. Thoughts, text and calls that follow each other are one message of the assistant."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case InputMessage(role="assistant"):
                message = _assistant(messages, "content")
                message["content"] = _text_of(item.content)
            case InputMessage():
                messages.append({"role": item.role, "content": _text_of(item.content)})
            case InputCall():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                call = ToolCall(id=item.call_id, type="function", function=function)
                _assistant(messages, None).setdefault("tool_calls", []).append(call)
            case InputCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text_of(item.output)})
            case InputReasoning():
                if text := "\n".join(part.text for part in item.content or ()):
                    _assistant(messages, "reasoning_content")["reasoning_content"] = text
    return [ChatMessage(**message) for message in messages]


def _assistant(messages: list[dict[str, Any]], field: str | None) -> dict[str, Any]:
    """The assistant's message that goes on: the last one, unless `field` or what comes behind it is there already."""
    order = ("reasoning_content", "content", "tool_calls")
    taken = () if field is None else order[order.index(field) :]
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in taken):
        messages.append({"role": "assistant"})
    return messages[-1]
