"""What clients may send to `/v1/responses`, and the chat that it amounts to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvferry.wire.sampling import MAX_LOGPROBS
from kvferry_gateway.errors import bad_request, unsupported
from kvferry_gateway.requests.messages import ChatMessage, Label
from kvferry_gateway.requests.openai import MAX_METADATA, ChatRequest, Priority, StreamOptions
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.response_items import InputItems, messages_of
from kvferry_gateway.requests.structured import JsonSchemaFormat, ResponseFormat
from kvferry_gateway.requests.tools import (
    MAX_DESCRIPTION_CHARS,
    MAX_TOOLS,
    Function,
    FunctionChoice,
    FunctionName,
    NamedTool,
    Tool,
)

LOGPROBS = "message.output_text.logprobs"


class FlatTool(RequestModel):
    """A function that the model may call. `strict` changes nothing, see `Function`."""

    type: Literal["function"]
    name: FunctionName
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def nested(self) -> Tool:
        function = Function(name=self.name, description=self.description, parameters=self.parameters)
        return Tool(type="function", function=function)


class FlatNamedTool(RequestModel):
    type: Literal["function"]
    name: FunctionName


class TextFormat(RequestModel):
    """`name` and what follows belong to `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> TextFormat:
        if self.type == "json_schema":
            for field, value in (("name", self.name), ("schema", self.json_schema)):
                if value is None:
                    param = f"text.format.{field}"
                    raise bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
        elif self.json_schema is not None:
            raise bad_request("'text.format.schema' belongs to the type 'json_schema'.", "text.format.schema")
        return self

    def nested(self) -> ResponseFormat:
        if self.json_schema is None or self.name is None:
            return ResponseFormat(type=self.type)
        return ResponseFormat(type=self.type, json_schema=JsonSchemaFormat(name=self.name, schema=self.json_schema))


class TextOptions(RequestModel):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None  # models are asked for no other


class ResponseStreamOptions(RequestModel):
    include_obfuscation: bool | None = None  # events are not padded in either case


class ResponsesRequest(RequestModel):
    """None: not given. Nothing is stored, whatever OpenAI's default for `store` is."""

    model: str | None = None
    input: str | InputItems
    instructions: str | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(default_factory=list)
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool = True
    priority: Priority = 0
    # Labels. They change nothing and are never logged.
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=MAX_METADATA)] | None = None

    @model_validator(mode="after")
    def _what_needs_a_store(self) -> ResponsesRequest:
        if self.store:
            raise unsupported("store")
        if self.previous_response_id is not None:
            raise unsupported("previous_response_id")
        if self.stream_options is not None and not self.stream:
            raise bad_request("'stream_options' is only allowed when 'stream' is true.", "stream_options")
        if self.top_logprobs and not self.wants_logprobs:
            raise bad_request(f"'top_logprobs' is only allowed when 'include' has '{LOGPROBS}'.", "top_logprobs")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include

    def as_chat(self) -> ChatRequest:
        """Raises `ApiError` 400, which names fields of a chat."""
        messages = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            messages.append(ChatMessage(role="user", content=self.input))
        else:
            messages += messages_of(self.input)
        choice = self.tool_choice
        if isinstance(choice, FlatNamedTool):
            named: Any = NamedTool(type="function", function=FunctionChoice(name=choice.name))
        else:
            named = choice
        text_format = None if self.text is None else self.text.format
        return ChatRequest(
            model=self.model,
            messages=messages,
            stream=self.stream,
            stream_options=StreamOptions(include_usage=True) if self.stream else None,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=self.wants_logprobs,
            top_logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            response_format=None if text_format is None else text_format.nested(),
            tools=[tool.nested() for tool in self.tools],
            tool_choice=named,
            parallel_tool_calls=self.parallel_tool_calls,
            priority=self.priority,
        )
