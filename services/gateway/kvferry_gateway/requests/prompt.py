"""From a request's messages or texts to token ids and sampling, with the checks that need the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import msgspec
import numpy as np

from kvferry.grammar.compiler import GrammarCompiler
from kvferry.runtime import Runtime
from kvferry.text.detokenizer import TokenTexts
from kvferry.text.errors import ChatTemplateError, InvalidTextError
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer
from kvferry.wire.fields import TokenArray
from kvferry.wire.sampling import Sampling
from kvferry_gateway.errors import bad_request
from kvferry_gateway.parsing.forms import PLAIN_TEXT, Reading, ReasoningParserName, ToolParserName
from kvferry_gateway.requests.conversation import Conversation, ConversationReader, Rendered
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.requests.reading import ReadingRules
from kvferry_gateway.requests.sampling import SamplingRules
from kvferry_gateway.requests.structured import GrammarCheck, constraint_of

# A text below this is tokenised on the event loop: it takes less time than a trip to a thread and back.
INLINE_CHARS: Final = 2048

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a worker needs to know of a request, or of one prompt of several."""

    tokens: TokenArray  # u32 [num_tokens]
    sampling: Sampling
    echo: str = ""  # the prompt's text, where the answer is to begin with it
    reading: Reading = PLAIN_TEXT


def most_tokens(prompts: Sequence[Prompt], num_drawn: int) -> int:
    """What they can come to, with `num_drawn` outputs each."""
    return sum(len(prompt.tokens) + num_drawn * prompt.sampling.max_tokens for prompt in prompts)


def within(prompts: Sequence[Prompt], num_drawn: int, most: int) -> list[Prompt]:
    """With outputs so short that all comes to `most` tokens; as they are, if it can't."""
    room = (most - sum(len(prompt.tokens) for prompt in prompts)) // (num_drawn * len(prompts))
    if room < max(1, prompts[0].sampling.min_tokens):
        return list(prompts)
    return [
        replace(prompt, sampling=msgspec.structs.replace(prompt.sampling, max_tokens=limit))
        for prompt in prompts
        for limit in (min(prompt.sampling.max_tokens, room),)
    ]


class Prompter:
    """One model's template and tokenizer. Long texts go through a thread, one after the other."""

    def __init__(
        self,
        model: ModelDir,
        runtime: Runtime,
        tool_call_parser: ToolParserName = "auto",
        reasoning_parser: ReasoningParserName = "auto",
    ) -> None:
        """Raises `CheckpointError`."""
        self.tokenizer: Final = Tokenizer(model)
        self.texts: Final = TokenTexts(self.tokenizer)
        self.eos_token_ids: Final = frozenset(self.tokenizer.eos_token_ids)
        self.readings: Final = ReadingRules(model, self.tokenizer, tool_call_parser, reasoning_parser)
        self._conversations = ConversationReader(model, self.tokenizer)
        self._vocab_size = model.vocab_size
        self._rules = SamplingRules(model, self.tokenizer, runtime)
        self._lane = runtime.lane("tokenizer")
        compiler = GrammarCompiler(model.tokenizer_path, model.vocab_size, self.eos_token_ids)
        self._grammars = GrammarCheck(compiler, runtime.lane("grammar", nice=5))

    def close(self) -> None:
        self._lane.close()
        self._grammars.close()

    async def prepare(self, request: ChatRequest | CompletionRequest, max_model_len: int) -> list[Prompt]:
        """The request's prompts: one, or several for a batch. Raises `ApiError` 400."""
        constraint = constraint_of(request.response_format, request.structured_outputs, self.readings.special)
        reading = PLAIN_TEXT
        if isinstance(request, ChatRequest):
            constraint = constraint or self.readings.constraint(request)
            rendered = await self.chat(_conversation(request))
            texts, thoughts = [rendered.tokens], rendered.thoughts
            # Free text with tags in it has room for thoughts.
            constrained = constraint is not None and constraint.grammar.kind != "tagged"
            reading = self.readings.of(request, thoughts, constrained=constrained)
            if constraint is not None:
                constraint = replace(constraint, grammar=self.readings.placed(constraint.grammar, thoughts))
        else:
            add = True if request.add_special_tokens is None else request.add_special_tokens
            texts = [
                await self.text(prompt, add) if isinstance(prompt, str) else self._given(prompt)
                for prompt in request.prompts
            ]
        texts = [_truncated(tokens, request, max_model_len) for tokens in texts]
        if any(len(tokens) == 0 for tokens in texts):
            raise bad_request("The prompt is empty.", request.prompt_field)
        grammar = None if constraint is None else constraint.grammar
        samplings = self._rules.of(request, [len(tokens) for tokens in texts], max_model_len, grammar)
        if constraint is not None:
            await self._grammars.check(constraint)
        echoes = [""] * len(texts)
        if isinstance(request, CompletionRequest) and request.echo:
            whole = request.truncate_prompt_tokens is None
            echoes = [
                prompt if whole and isinstance(prompt, str) else self.tokenizer.decode(tokens)
                for prompt, tokens in zip(request.prompts, texts, strict=True)
            ]
        return [Prompt(*parts, reading) for parts in zip(texts, samplings, echoes, strict=True)]

    async def text(self, text: str, add_special_tokens: bool) -> TokenArray:
        """Token ids of a bare text. Raises `ApiError` 400."""
        return await self._run(len(text), "prompt", lambda: self.tokenizer.encode(text, add_special_tokens))

    async def chat(self, conversation: Conversation) -> Rendered:
        """A conversation's prompt. Raises `ApiError` 400."""
        return await self._run(conversation.num_chars, "messages", lambda: self._conversations.read(conversation))

    async def _run(self, num_chars: int, field: str, call: Callable[[], T]) -> T:
        try:
            return call() if num_chars < INLINE_CHARS else await self._lane.run(call)
        except InvalidTextError as error:
            raise bad_request(f"The text is not valid Unicode: {error}", field) from None
        except ChatTemplateError as error:
            raise bad_request(f"The model's chat template refused: {error.reason[:500]}", field) from None

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
        request.usable_tools,
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
