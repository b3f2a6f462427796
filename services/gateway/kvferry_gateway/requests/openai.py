"""What clients may send: the fields that are built, by route. `body.py` deals with all others."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field, model_validator

from kvferry.text.stop import MAX_STOP_CHARS, MAX_STOP_STRINGS
from kvferry.wire.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_REPETITION_PENALTY, MAX_TOKEN_LIST
from kvferry_gateway.errors import bad_request
from kvferry_gateway.requests.messages import Label, Messages
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.structured import ResponseFormat, StructuredOutputs
from kvferry_gateway.requests.tools import NamedTool, ToolChoice, Tools

MAX_METADATA: Final = 64  # entries; OpenAI takes 16
MAX_CHOICES: Final = 128  # of one request, over all its prompts
MAX_TEMPLATE_KWARGS: Final = 64

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 32) - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Priority = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(RequestModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(RequestModel):
    """Fields that both routes share. None: not given."""

    model: str | None = None  # the only one, where there is one
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None  # -1 and 0: no limit
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MAX_REPETITION_PENALTY)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: only the prompt is looked at
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_LIST)] = Field(default_factory=list)
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_TOKEN_LIST // 2)] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None  # -1: to what leaves room for the output
    return_token_ids: bool = False
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Priority = 0
    # Labels. They change nothing and are never logged.
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=MAX_METADATA)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise bad_request("'stream_options' is only allowed when 'stream' is true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("'prompt_logprobs' can't be streamed.", "prompt_logprobs", "unsupported_value")
        if self.max_tokens == 0 and self.prompt_logprobs is None and not self.echoes:
            raise bad_request(
                "'max_tokens' is 0, which only goes together with 'echo' or 'prompt_logprobs'.",
                "max_tokens", "invalid_value",
            )  # fmt: skip
        return self

    @property
    def echoes(self) -> bool:
        """Whether answers begin with their prompt."""
        return False

    @property
    def num_echoed_logprobs(self) -> int | None:
        """How many best tokens are told beside each one of an echoed prompt; None: no log-probabilities."""
        return self.num_logprobs if self.echoes else None

    @property
    def num_scored(self) -> int | None:
        """How many best tokens beside each one of the prompt workers are asked for; None: no log-probabilities."""
        asked = (self.prompt_logprobs, self.num_echoed_logprobs)
        return max((num_top for num_top in asked if num_top is not None), default=None)

    @property
    def num_logprobs(self) -> int | None:
        """How many best tokens are told beside each drawn one; None: no log-probabilities."""
        return None

    @property
    def num_drawn(self) -> int:
        """Outputs of each prompt; `n` of them are told."""
        return self.n

    @property
    def num_logprobs_needed(self) -> int | None:
        """`num_logprobs` of the workers: 0 where the gateway needs them to choose."""
        return 0 if self.num_logprobs is None and self.num_drawn > self.n else self.num_logprobs

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_on(self) -> bool:
        """Whether each event of a stream tells the counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def prompt_field(self) -> str:
        """The field that the prompt came from, for errors."""
        return "prompt"

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def token_limit_field(self) -> str:
        """The field that `token_limit` came from, for errors."""
        return "max_tokens"


class ChatRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[Label, Any], Field(max_length=MAX_TEMPLATE_KWARGS)] | None = None
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None  # None: "auto" where there are tools
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _fields_that_need_others(self) -> ChatRequest:
        for place, message in enumerate(self.messages):
            message.check(f"messages[{place}]")
        self._check_tools()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
        check_conversation_end(self.add_generation_prompt, self.continue_final_message)
        return self

    def _check_tools(self) -> None:
        names = {tool.function.name for tool in self.tools}
        if len(names) < len(self.tools):
            raise bad_request("Two of the 'tools' have one name.", "tools", "invalid_value")
        choice = self.tool_choice
        if choice == "required" and not self.tools:
            raise bad_request("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise bad_request(f"'tool_choice': no tool has the name '{choice.function.name}'.", "tool_choice")
        if self.demands_a_call and (self.response_format or self.structured_outputs):
            raise bad_request("'tool_choice' demands a call, which has its own form.", "response_format")

    @property
    def demands_a_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def usable_tools(self) -> Tools:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def token_limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class CompletionRequest(GenerationRequest):
    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _fields_that_need_others(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise bad_request("'best_of' must not be below 'n'.", "best_of", "invalid_value")
        if self.stream and self.num_drawn > self.n:
            raise bad_request("'best_of' above 'n' can't be streamed.", "best_of", "unsupported_value")
        if len(self.prompts) > MAX_CHOICES:
            size = len(self.prompts)
            raise bad_request(f"'prompt' has {size} prompts, more than {MAX_CHOICES}.", "prompt", "invalid_value")
        if len(self.prompts) * self.num_drawn > MAX_CHOICES:
            field = "n" if self.best_of is None else "best_of"
            raise bad_request(f"Prompts times '{field}' is more than {MAX_CHOICES}.", field, "invalid_value")
        return self

    @property
    def echoes(self) -> bool:
        return self.echo

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_drawn(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """One or more texts or lists of token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        ids = [part for part in self.prompt if isinstance(part, int)]
        if ids:
            return (ids,)
        return tuple(part for part in self.prompt if not isinstance(part, int))


def check_conversation_end(add_generation_prompt: bool, continue_final_message: bool) -> None:
    if continue_final_message and add_generation_prompt:
        raise bad_request(
            "'continue_final_message' needs 'add_generation_prompt' to be false.", "continue_final_message"
        )
