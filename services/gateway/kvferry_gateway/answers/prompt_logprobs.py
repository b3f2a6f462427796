"""Log-probabilities of a prompt in the forms that clients get, encoded: vLLM's `prompt_logprobs`, and the columns of an
echo. A long prompt's are megabytes of JSON, so they are made a few tokens at a time between turns of the loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvferry.text.detokenizer import TokenTexts
from kvferry.wire.fields import TokenArray
from kvferry_gateway.answers.logprobs import ToldToken, finite, name_of, text_logprobs
from kvferry_gateway.answers.prompt_scores import PromptScores
from kvferry_gateway.errors import bad_request

MAX_TOLD: Final = 1 << 20  # log-probabilities of prompts in one answer: some 60 MB of JSON
TOKENS_PER_TURN: Final = 24  # with 20 best tokens each, half a millisecond


def check_size(num_tokens: int, num_choices: int, num_top: int, field: str) -> None:
    """Of prompts with `num_tokens` in all, told with each of their choices. Raises `ApiError` 400."""
    if (size := num_tokens * num_choices * (1 + num_top)) > MAX_TOLD:
        raise bad_request(
            f"'{field}' asks for {size} log-probabilities of prompts; an answer may have {MAX_TOLD}.",
            field, "invalid_value",
        )  # fmt: skip


class EchoedLogprobs(NamedTuple):
    """The columns of a completion's `logprobs` for the prompt's tokens, without their brackets."""

    text_offset: bytes
    token_logprobs: bytes
    tokens: bytes
    top_logprobs: bytes


class PromptTold(NamedTuple):
    """What an answer tells of its prompt's likelihood."""

    entries: bytes | None = None  # `prompt_logprobs`
    echoed: EchoedLogprobs | None = None


NOTHING_TOLD: Final = PromptTold()


class _Row(NamedTuple):
    token: int
    rank: int
    logprob: float
    best: tuple[tuple[int, float], ...]  # (token, log-probability), best first


def _rows(tokens: TokenArray, scores: PromptScores, start: int, end: int, num_top: int) -> Iterator[_Row]:
    columns = (tokens[start:end].tolist(), scores.ranks[start:end].tolist(), scores.logprobs[start:end].tolist(),
               scores.top_tokens[start:end].tolist())  # fmt: skip
    for token, rank, (logprob, *others), best in zip(*columns, strict=True):
        yield _Row(token, rank, logprob, tuple(zip(best[:num_top], others[:num_top], strict=True)))


def _turns(num_tokens: int) -> Iterator[tuple[int, int]]:
    """Positions [start, end) of the tokens that have log-probabilities, a turn's each."""
    for start in range(1, num_tokens, TOKENS_PER_TURN):
        yield start, min(start + TOKENS_PER_TURN, num_tokens)


async def encoded_entries(tokens: TokenArray, scores: PromptScores, num_top: int, texts: TokenTexts) -> bytes:
    """A list with null for the first token, and for each other one its own and its best tokens' by token id."""
    encoded = [b"null"]
    for start, end in _turns(len(tokens)):
        for row in _rows(tokens, scores, start, end, num_top):
            entries = [_entry(row.token, row.logprob, row.rank, texts)]
            entries += [
                _entry(token, logprob, rank, texts)
                for rank, (token, logprob) in enumerate(row.best, 1)
                if token != row.token
            ]
            encoded.append(b"{" + b",".join(entries) + b"}")
        await asyncio.sleep(0)
    return b"[" + b",".join(encoded) + b"]"


def _entry(token: int, logprob: float, rank: int, texts: TokenTexts) -> bytes:
    text = json.dumps(texts.bytes_of(token).decode("utf-8", "replace"))
    return f'"{token}":{{"logprob":{finite(logprob)!r},"rank":{rank},"decoded_token":{text}}}'.encode()


async def encoded_echo(
    tokens: TokenArray, scores: PromptScores, num_top: int, texts: TokenTexts, echo: str
) -> EchoedLogprobs:
    """`echo`: the prompt's text, which the answer begins with."""
    offsets, logprobs, names, tops = [b"0"], [b"null"], [], [b"null"]
    detokenizer = texts.stream(skip_special_tokens=False)
    offset = 0

    def tell(token: int) -> None:
        nonlocal offset
        names.append(json.dumps(name_of(token, texts)).encode())
        text = detokenizer.push(token)
        # A special token that the tokenizer has put before the text is none of it.
        if not texts.is_special(token) or echo.startswith(text, offset):
            offset += len(text)

    tell(int(tokens[0]))
    for start, end in _turns(len(tokens)):
        for row in _rows(tokens, scores, start, end, num_top):
            offsets.append(str(offset).encode())
            tell(row.token)
            logprobs.append(repr(finite(row.logprob)).encode())
            best = {name_of(token, texts): finite(logprob) for token, logprob in row.best}
            best.setdefault(name_of(row.token, texts), finite(row.logprob))
            tops.append(json.dumps(best, separators=(",", ":")).encode())
        await asyncio.sleep(0)
    return EchoedLogprobs(*(b",".join(column) for column in (offsets, logprobs, names, tops)))


def encoded_columns(echoed: EchoedLogprobs, told: Sequence[ToldToken], texts: TokenTexts) -> bytes:
    """The `logprobs` of a completion that begins with its prompt."""
    columns = text_logprobs(told, texts)
    parts = []
    for name, before in echoed._asdict().items():
        behind = json.dumps(columns[name], ensure_ascii=False, separators=(",", ":")).encode()[1:-1]
        parts.append(f'"{name}":['.encode() + before + (b"," + behind if behind else b"") + b"]")
    return b"{" + b",".join(parts) + b"}"
