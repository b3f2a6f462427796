"""A request's sampling fields as workers get them, with the checks that need the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvferry.runtime import Runtime
from kvferry.text.errors import InvalidTextError
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.sampling import MAX_TOKEN_LIST, Grammar, Sampling
from kvferry_gateway.errors import bad_request, context_length_exceeded
from kvferry_gateway.requests.openai import ChatRequest, GenerationRequest

DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's
DEFAULT_TEMPERATURE: Final = 1.0
DEFAULT_TOP_P: Final = 1.0


class SamplingRules:
    """One model's defaults and bounds."""

    def __init__(self, model: ModelDir, tokenizer: Tokenizer, runtime: Runtime) -> None:
        self._defaults = model.sampling
        self._vocab_size = model.vocab_size
        self._tokenizer = tokenizer
        self._runtime = runtime

    def of(
        self,
        request: GenerationRequest,
        num_prompts: Sequence[int],
        max_model_len: int,
        grammar: Grammar | None = None,
    ) -> list[Sampling]:
        """For prompts of these lengths; all with one seed. Raises `ApiError` 400."""
        defaults = self._defaults
        seed = self._runtime.random_u64() if request.seed is None else request.seed % (1 << 64)
        limits = [max_tokens(request, num_prompt, max_model_len) for num_prompt in num_prompts]
        if request.min_tokens > min(limits):
            raise bad_request(f"'min_tokens' is above the {min(limits)} tokens to generate.", "min_tokens")
        sampling = Sampling(
            temperature=_first(request.temperature, defaults.temperature, DEFAULT_TEMPERATURE),
            top_p=_first(request.top_p, defaults.top_p, DEFAULT_TOP_P),
            top_k=max(0, int(_first(request.top_k, defaults.top_k, 0))),
            min_p=_first(request.min_p, defaults.min_p, 0.0),
            seed=seed,
            ignore_eos=request.ignore_eos,
            presence_penalty=_first(request.presence_penalty, 0.0),
            frequency_penalty=_first(request.frequency_penalty, 0.0),
            repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
            logit_bias=self._logit_bias(request),
            min_tokens=request.min_tokens,
            stop_token_ids=self._known(request.stop_token_ids, "stop_token_ids"),
            banned=self._banned(request.bad_words),
            num_logprobs=request.num_logprobs_needed,
            grammar=grammar,
        )
        return [msgspec.structs.replace(sampling, max_tokens=limit) for limit in limits]

    def _known(self, token_ids: Sequence[int], field: str) -> tuple[int, ...]:
        for token_id in token_ids:
            if token_id >= self._vocab_size:
                raise bad_request(f"'{field}': {token_id} is not below {self._vocab_size}.", field, "invalid_value")
        return tuple(token_ids)

    def _logit_bias(self, request: GenerationRequest) -> tuple[tuple[int, float], ...]:
        given = request.logit_bias or {}
        token_ids = self._known([int(key) for key in given], "logit_bias")
        return tuple(zip(token_ids, map(float, given.values()), strict=True))

    def _banned(self, words: Sequence[str]) -> tuple[int, ...]:
        """The token of each word, and the one that it has within a text, behind a space."""
        banned: dict[int, None] = {}
        for place, word in enumerate(words):
            param = f"bad_words[{place}]"
            try:
                bare = self._tokenizer.encode(word, add_special_tokens=False)
                spaced = self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            except InvalidTextError as error:
                raise bad_request(f"The text is not valid Unicode: {error}", param) from None
            if len(bare) != 1:
                raise bad_request(
                    f"'{param}' is {len(bare)} tokens; only words of one token can be banned.",
                    "bad_words", "unsupported_value",
                )  # fmt: skip
            banned[int(bare[0])] = None
            if len(spaced) == 1:
                banned[int(spaced[0])] = None
        return self._known(list(banned)[:MAX_TOKEN_LIST], "bad_words")


def max_tokens(request: GenerationRequest, num_prompt: int, max_model_len: int) -> int:
    """The limit that was given, or the default of the route, within the context. Raises `ApiError`."""
    remaining = max_model_len - num_prompt
    if remaining < 1:
        raise context_length_exceeded(
            f"This model's maximum context length is {max_model_len} tokens; the prompt alone has {num_prompt}.",
            request.prompt_field,
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


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
