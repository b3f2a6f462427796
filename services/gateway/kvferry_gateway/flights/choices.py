"""The choices of one request: `n` for each of its prompts, each a unit of its own with its own stream.

The choices of a prompt share its KV by the prefix cache: the first one, the leader, is placed at once, the others
when its first token has shown that the prompt is computed.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kvferry_gateway.answers.answer import Answer, FinishReason, Usage, WholeChoice
from kvferry_gateway.answers.prompt_logprobs import NOTHING_TOLD, PromptTold, encoded_echo, encoded_entries
from kvferry_gateway.answers.prompt_scores import PromptScores
from kvferry_gateway.flights.flight import Flight
from kvferry_gateway.parsing.parts import Content, Part
from kvferry_gateway.requests.prompt import Prompt
from kvferry_gateway.streams.stream import TextRules, TokenStream
from kvferry_gateway.streams.told import ToldStream


@dataclass(eq=False, slots=True)
class Choice:
    """One output. `index` is its place in the answer."""

    index: int
    prompt: Prompt
    stream: TokenStream
    flight: Flight
    leader: Choice | None = None  # None: it leads itself
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # its first token has come, or none will
    reason: FinishReason = "length"

    async def land(self) -> None:
        """Until it is complete. A follower is placed here. Raises `ApiError`, `ClientGone`."""
        try:
            if self.leader is not None:
                await self.leader.begun.wait()
                await self.flight.follow()
            reason = await self.flight.land()
        finally:
            self.begun.set()
        self.stream.finish()
        self.reason = "stop" if self.stream.stopped else reason
        if self.reason == "stop" and isinstance(self.stream, ToldStream) and self.stream.num_calls:
            self.reason = "tool_calls"

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; the stream was told their log-probabilities."""
        assert isinstance(self.stream, ToldStream), "it was asked for them"
        found = [item.logprobs.logprob for item in self.stream.told if item.logprobs is not None]
        return sum(found) / len(found) if found else -math.inf

    @property
    def scores(self) -> PromptScores | None:
        """Of its prompt, whose leader asks for them."""
        return (self.leader or self).stream.scores

    async def tell_prompt(self, answer: Answer) -> PromptTold:
        """How likely its prompt is, in the forms that are asked for; waits until that is known."""
        scores, details, prompt = self.scores, answer.details, self.prompt
        if scores is None:
            return NOTHING_TOLD
        await scores.complete.wait()
        entries = echoed = None
        if (num_top := details.num_prompt_top) is not None:
            entries = await encoded_entries(prompt.tokens, scores, num_top, answer.texts)
        if (num_top := details.num_echoed_top) is not None:
            echoed = await encoded_echo(prompt.tokens, scores, num_top, answer.texts, prompt.echo)
        return PromptTold(entries, echoed)

    def whole(self, told_prompt: PromptTold = NOTHING_TOLD) -> WholeChoice:
        """As a part of an answer that is not streamed. Takes the text."""
        text: str = json.loads(b'"' + self.stream.take() + b'"')
        told = self.stream.told if isinstance(self.stream, ToldStream) else ()
        parts: list[Part] = [Content(self.prompt.echo + text)]
        if (parser := self.prompt.reading.parser()) is not None:
            parts = [*parser.push(text), *parser.finish()]
            if parser.num_calls and self.reason == "stop":
                self.reason = "tool_calls"
        return WholeChoice(parts, self.reason, told, self.prompt.tokens.tolist(), told_prompt)


def make_stream(
    answer: Answer, index: int, prompt: Prompt, stops: Sequence[str], rules: TextRules, *, streamed: bool
) -> TokenStream:
    """A stream whose pieces are events of `answer`, or bare text where nothing is streamed."""
    texts, limit = answer.texts, prompt.sampling.max_tokens
    answer.prompt_sizes[index] = len(prompt.tokens)
    scored = prompt.sampling.num_logprobs is not None

    def frame(numerics_id: str) -> tuple[bytes, bytes]:
        answer.placed(index, numerics_id)
        return answer.event_frame(index) if streamed else (b"", b"")

    parser = prompt.reading.parser() if streamed else None
    if not (scored or answer.details) and parser is None and not (streamed and answer.told_in_parts):
        return TokenStream(texts, stops, limit, rules, frame)
    return ToldStream(
        texts,
        stops,
        limit,
        rules,
        frame,
        wants_logprobs=scored,
        make_event=(lambda parts, told: answer.told_event(index, parts, told)) if streamed else None,
        parser=parser,
        num_chars=len(prompt.echo),
    )


def best(choices: Sequence[Choice], n: int) -> list[Choice]:
    """Of each prompt's choices the `n` likeliest per token, the likeliest first; as they are if there are no more."""
    prompts: dict[Choice, list[Choice]] = {}
    for choice in choices:
        prompts.setdefault(choice.leader or choice, []).append(choice)
    ranked = [
        drawn if len(drawn) <= n else sorted(drawn, key=lambda choice: choice.mean_logprob, reverse=True)[:n]
        for drawn in prompts.values()
    ]
    return [choice for drawn in ranked for choice in drawn]


def usage_of(choices: Sequence[Choice]) -> Usage:
    """Each prompt counts once, with what its leader found in a cache."""
    leaders = [choice for choice in choices if choice.leader is None]
    num_prompt = sum(len(choice.prompt.tokens) for choice in leaders)
    cached = sum(min(choice.stream.cached_tokens, len(choice.prompt.tokens)) for choice in leaders)
    thoughts = [choice.prompt.reading.num_thought_tokens(choice.stream.tokens) for choice in choices]
    known = [count for count in thoughts if count is not None]
    num_generated = sum(len(choice.stream.tokens) for choice in choices)
    return Usage(num_prompt, num_generated, cached, sum(known) if known else None)


async def together(choices: Sequence[Choice], act: Callable[[Choice], Awaitable[None]]) -> None:
    """Act on all at once. The first failure cancels the others and is raised."""
    if len(choices) == 1:
        return await act(choices[0])
    tasks = [asyncio.ensure_future(act(choice)) for choice in choices]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
