"""From a request's messages or texts to token ids and sampling, with the checks that need the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from kvferry.runtime import Runtime
from kvferry.text.chat_template import ChatTemplate
from kvferry.text.detokenizer import TokenTexts
from kvferry.text.errors import ChatTemplateError, InvalidTextError
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.messages import Sampling, TokenArray
from kvferry_gateway.errors import bad_request
from kvferry_gateway.openai import ChatMessage, ChatRequest, CompletionRequest
from kvferry_gateway.sampling import SamplingRules, prompt_field

# A text below this is tokenised on the event loop: it takes less time than a trip to a thread and back.
INLINE_CHARS: Final = 2048
# Template variables that are not the client's to set.
_RESERVED: Final = frozenset({"self", "messages", "add_generation_prompt", "tools", "documents"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a worker needs to know of a request, or of one prompt of several."""

    tokens: TokenArray  # u32 [num_tokens]
    sampling: Sampling
    echo: str = ""  # the prompt's text, where the answer is to begin with it


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given."""

    messages: Sequence[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = False

    @property
    def num_chars(self) -> int:
        return sum(len(message.for_template()["content"]) for message in self.messages)


class Prompter:
    """One model's template and tokenizer. Long texts go through a thread, one after the other."""

    def __init__(self, model: ModelDir, runtime: Runtime) -> None:
        """Raises `CheckpointError`."""
        self.tokenizer: Final = Tokenizer(model)
        self.texts: Final = TokenTexts(self.tokenizer)
        self.eos_token_ids: Final = frozenset(self.tokenizer.eos_token_ids)
        self._template = ChatTemplate.of(model)
        self._knows_developer = "developer" in (model.chat_template or "")
        self._vocab_size = model.vocab_size
        self._rules = SamplingRules(model, self.tokenizer, runtime)
        self._lane = runtime.lane("tokenizer")

    def close(self) -> None:
        self._lane.close()

    async def prepare(self, request: ChatRequest | CompletionRequest, max_model_len: int) -> list[Prompt]:
        """The request's prompts: one, or several for a batch. Raises `ApiError` 400."""
        field = prompt_field(request)
        if isinstance(request, ChatRequest):
            texts = [await self.chat(_conversation(request))]
        else:
            add = True if request.add_special_tokens is None else request.add_special_tokens
            texts = [
                await self.text(prompt, add) if isinstance(prompt, str) else self._given(prompt)
                for prompt in request.prompts
            ]
        texts = [_truncated(tokens, request, max_model_len) for tokens in texts]
        if any(len(tokens) == 0 for tokens in texts):
            raise bad_request("The prompt is empty.", field)
        samplings = self._rules.of(request, [len(tokens) for tokens in texts], max_model_len)
        echoes = [""] * len(texts)
        if isinstance(request, CompletionRequest) and request.echo:
            whole = request.truncate_prompt_tokens is None
            echoes = [
                prompt if whole and isinstance(prompt, str) else self.tokenizer.decode(tokens)
                for prompt, tokens in zip(request.prompts, texts, strict=True)
            ]
        return [Prompt(*parts) for parts in zip(texts, samplings, echoes, strict=True)]

    async def text(self, text: str, add_special_tokens: bool) -> TokenArray:
        """Token ids of a bare text. Raises `ApiError` 400."""
        return await self._run(len(text), "prompt", lambda: self.tokenizer.encode(text, add_special_tokens))

    async def chat(self, conversation: Conversation) -> TokenArray:
        """Token ids of a conversation. Raises `ApiError` 400."""
        return await self._run(conversation.num_chars, "messages", lambda: self._chat(conversation))

    async def _run(self, num_chars: int, field: str, call: Callable[[], T]) -> T:
        try:
            return call() if num_chars < INLINE_CHARS else await self._lane.run(call)
        except InvalidTextError as error:
            raise bad_request(f"The text is not valid Unicode: {error}", field) from None
        except ChatTemplateError as error:
            raise bad_request(f"The model's chat template refused: {error.reason[:500]}", field) from None

    def _chat(self, conversation: Conversation) -> TokenArray:
        if self._template is None:
            raise bad_request("This model has no chat template: use /v1/completions.", "messages")
        kwargs = conversation.kwargs or {}
        if reserved := _RESERVED & kwargs.keys():
            param = f"chat_template_kwargs.{min(reserved)}"
            raise bad_request(f"'{param}' is not for requests to set.", param, "invalid_value")
        messages = [self._message(message) for message in conversation.messages]
        rendered = self._template.render(messages, conversation.add_generation_prompt, **kwargs)
        if conversation.continue_final_message:
            rendered = _cut_after(rendered, messages[-1]["content"])
        return self.tokenizer.encode(rendered, conversation.add_special_tokens)

    def _message(self, message: ChatMessage) -> dict[str, str]:
        """`developer` is OpenAI's newer name of `system`, which few templates know."""
        made = message.for_template()
        if made["role"] == "developer" and not self._knows_developer:
            made["role"] = "system"
        return made

    def _given(self, token_ids: list[int]) -> TokenArray:
        tokens = np.array(token_ids, dtype=np.uint32)
        if int(tokens.max()) >= self._vocab_size:
            raise bad_request(f"A token id of the prompt is not below {self._vocab_size}.", "prompt")
        return tokens


def _conversation(request: ChatRequest) -> Conversation:
    return Conversation(
        request.messages,
        request.add_generation_prompt,
        request.continue_final_message,
        request.chat_template_kwargs,
        bool(request.add_special_tokens),
    )


def _truncated(tokens: TokenArray, request: ChatRequest | CompletionRequest, max_model_len: int) -> TokenArray:
    """The last `truncate_prompt_tokens`; for -1 as many as leave room for the output."""
    limit = request.truncate_prompt_tokens
    if limit is None:
        return tokens
    if limit == 0 or limit > max_model_len:
        raise bad_request(f"'truncate_prompt_tokens' is -1 or from 1 to {max_model_len}.", "truncate_prompt_tokens")
    if limit == -1:
        limit = max(1, max_model_len - (request.token_limit or 1))
    return tokens[-limit:]


def _cut_after(rendered: str, content: str) -> str:
    """The rendered conversation up to the end of its last message, so that the model goes on with it."""
    place = rendered.rfind(content.strip())
    if place < 0 or not content.strip():
        raise bad_request(
            "The last message can't be continued: the chat template does not show it as it is.",
            "continue_final_message",
        )
    # Its trailing white space stays where the template has kept it.
    whole = content.lstrip()
    kept = whole if rendered.startswith(whole, place) else content.strip()
    return rendered[: place + len(kept)]
