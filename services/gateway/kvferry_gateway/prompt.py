"""From a request's messages or text to token ids and sampling, with the checks that need the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvferry.runtime import Runtime
from kvferry.text.chat_template import ChatTemplate
from kvferry.text.detokenizer import TokenTexts
from kvferry.text.errors import ChatTemplateError, InvalidTextError
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.messages import Sampling, TokenArray
from kvferry_gateway.errors import bad_request, context_length_exceeded
from kvferry_gateway.openai import ChatRequest, CompletionRequest, GenerationRequest

# A text below this is tokenised on the event loop: it takes less time than a trip to a thread and back.
INLINE_CHARS: Final = 2048
DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's
DEFAULT_TEMPERATURE: Final = 1.0
DEFAULT_TOP_P: Final = 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a worker needs to know of a request."""

    tokens: TokenArray  # u32 [num_tokens]
    sampling: Sampling


class Prompter:
    """One model's template and tokenizer. Long texts go through a thread, one after the other."""

    def __init__(self, model: ModelDir, runtime: Runtime) -> None:
        """Raises `CheckpointError`."""
        self.tokenizer: Final = Tokenizer(model)
        self.texts: Final = TokenTexts(self.tokenizer)
        self.eos_token_ids: Final = frozenset(self.tokenizer.eos_token_ids)
        self._template = ChatTemplate.of(model)
        self._defaults = model.sampling
        self._vocab_size = model.vocab_size
        self._runtime = runtime
        self._lane = runtime.lane("tokenizer")

    def close(self) -> None:
        self._lane.close()

    async def prepare(self, request: ChatRequest | CompletionRequest, max_model_len: int) -> Prompt:
        """Raises `ApiError` 400."""
        try:
            tokens = await self._tokenize(request)
        except InvalidTextError as error:
            raise bad_request(f"The text is not valid Unicode: {error}", _prompt_field(request)) from None
        except ChatTemplateError as error:
            raise bad_request(f"The model's chat template refused: {error.reason[:500]}", "messages") from None
        if len(tokens) == 0:
            raise bad_request("The prompt is empty.", _prompt_field(request))
        return Prompt(tokens, self._sampling(request, len(tokens), max_model_len))

    async def _tokenize(self, request: ChatRequest | CompletionRequest) -> TokenArray:
        if isinstance(request, ChatRequest):
            chars = sum(len(message.for_template()["content"]) for message in request.messages)
            if chars < INLINE_CHARS:
                return self._chat(request)
            return await self._lane.run(self._chat, request)
        if isinstance(request.prompt, list):
            return self._given(request.prompt)
        if len(request.prompt) < INLINE_CHARS:
            return self.tokenizer.encode(request.prompt)
        return await self._lane.run(self.tokenizer.encode, request.prompt)

    def _chat(self, request: ChatRequest) -> TokenArray:
        if self._template is None:
            raise bad_request("This model has no chat template: use /v1/completions.", "messages")
        messages = [message.for_template() for message in request.messages]
        return self.tokenizer.encode_chat(self._template.render(messages))

    def _given(self, token_ids: list[int]) -> TokenArray:
        tokens = np.array(token_ids, dtype=np.uint32)
        if int(tokens.max()) >= self._vocab_size:
            raise bad_request(f"A token id of the prompt is not below {self._vocab_size}.", "prompt")
        return tokens

    def _sampling(self, request: GenerationRequest, num_prompt: int, max_model_len: int) -> Sampling:
        defaults = self._defaults
        top_k = _first(request.top_k, defaults.top_k, 0)
        seed = self._runtime.random_u64() if request.seed is None else request.seed % (1 << 64)
        return Sampling(
            temperature=_first(request.temperature, defaults.temperature, DEFAULT_TEMPERATURE),
            top_p=_first(request.top_p, defaults.top_p, DEFAULT_TOP_P),
            top_k=max(0, int(top_k)),
            min_p=_first(request.min_p, defaults.min_p, 0.0),
            seed=seed,
            max_tokens=_max_tokens(request, num_prompt, max_model_len),
            ignore_eos=request.ignore_eos,
            presence_penalty=_first(request.presence_penalty, 0.0),
            frequency_penalty=_first(request.frequency_penalty, 0.0),
            repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        )


def _max_tokens(request: GenerationRequest, num_prompt: int, max_model_len: int) -> int:
    """The limit that was given, or the default of the route, within the context. Raises `ApiError`."""
    remaining = max_model_len - num_prompt
    if remaining < 1:
        raise context_length_exceeded(
            f"This model's maximum context length is {max_model_len} tokens; the prompt alone has {num_prompt}.",
            _prompt_field(request),
        )
    limit = request.token_limit
    if limit is None:
        return remaining if isinstance(request, ChatRequest) else min(remaining, DEFAULT_COMPLETION_TOKENS)
    if limit > remaining:
        raise context_length_exceeded(
            f"This model's maximum context length is {max_model_len} tokens; {num_prompt} in the prompt and "
            f"{limit} to generate are {num_prompt + limit}.",
            request.token_limit_field,
        )
    return limit


def _prompt_field(request: GenerationRequest) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
