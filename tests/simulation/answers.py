"""What clients must get, from the text of their requests alone; and the check of what they do get, as it comes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from scripted_worker import EOS, text_of
from tiny import mask_of

from kvferry.engine.memory.runner import (
    Lanes,
    MemorySettings,
    chain,
    drawn_tokens,
    expand,
    pick,
    root_state,
)
from kvferry.schedule.step import Draw, Logprobs
from kvferry.wire.sampling import Sampling

LOGPROB_TOLERANCE = 1e-5


class WrongAnswer(AssertionError):
    """A client got what an undisturbed run would not give."""


@dataclass(frozen=True)
class Expected:
    """One choice of an undisturbed run."""

    tokens: tuple[int, ...]
    text: str
    reason: str
    logprobs: tuple[Logprobs | None, ...]


@lru_cache(maxsize=4096)
def _continued(
    model: MemorySettings, prompt: tuple[int, ...], sampling: Sampling, choice: int
) -> tuple[tuple[int, Logprobs | None], ...]:
    found = []
    for drawn in drawn_tokens(model, prompt, sampling, choice, sampling.max_tokens, mask_of(sampling.grammar)):
        found.append(drawn)
        if sampling.is_end(drawn[0], model.eos_token_ids):
            break
    return tuple(found)


def expected_of(
    model: MemorySettings, prompt: tuple[int, ...], sampling: Sampling, choice: int, stops: tuple[str, ...]
) -> Expected:
    scored = _continued(model, prompt, sampling, choice)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    text, reason, tokens = "", "length", list[int]()
    unsearched = 0  # characters in which no stop string is looked for
    for token, _ in scored:
        tokens.append(token)
        text += "" if token == EOS or token in sampling.stop_token_ids else utf8.decode(bytes([token - 1]))
        if len(tokens) <= sampling.min_tokens:
            unsearched = len(text)
        found = [(text.find(stop, unsearched), -len(stop)) for stop in stops if stop in text[unsearched:]]
        if found:
            end, length = min(found, key=lambda at: (at[0] - at[1], at[1]))
            logprobs = tuple(row for _, row in scored[: len(tokens)])
            assert end - length >= 0
            return Expected(tuple(tokens), text[:end], "stop", logprobs)
        if sampling.is_end(token, model.eos_token_ids):
            # The twin shares its rules of what may be drawn with the product. A grammar may leave nothing but the end.
            if len(tokens) <= sampling.min_tokens and sampling.grammar is None:
                raise WrongAnswer(f"an end after {len(tokens)} of at least {sampling.min_tokens} tokens")
            reason = "stop"
            break
    text += utf8.decode(b"", final=True)
    found = [at for stop in stops if (at := text.find(stop, unsearched)) >= 0]
    assert not found, "a stop string that only the last character completes"
    return Expected(tuple(tokens), text, reason, tuple(row for _, row in scored[: len(tokens)]))


class ExactCheck:
    """One choice as it comes, against an undisturbed run's."""

    def __init__(self, expected: Expected) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._expected = expected
        self._num_scored = 0

    def take(self, text: str, token_ids: Sequence[int] | None, logprobs: Sequence[dict[str, Any]]) -> None:
        """What one event brings. Raises `WrongAnswer`."""
        expected = self._expected
        if not expected.text.startswith(text, len(self.text)):
            raise WrongAnswer(f"text {text!r} after {self.text!r} instead of {expected.text[len(self.text) :]!r}")
        self.text += text
        if token_ids is not None:
            self.tokens += token_ids
            if list(expected.tokens[: len(self.tokens)]) != self.tokens:
                raise WrongAnswer(f"tokens {self.tokens} instead of {list(expected.tokens)}")
        for entry in logprobs:
            row = expected.logprobs[self._num_scored] if self._num_scored < len(expected.logprobs) else None
            if row is None or abs(entry["logprob"] - row.logprob) > LOGPROB_TOLERANCE:
                raise WrongAnswer(f"log-probability {entry} at {self._num_scored} instead of {row}")
            self._num_scored += 1

    def end(self, reason: str) -> None:
        """Its last event. Raises `WrongAnswer`."""
        expected = self._expected
        if (reason, self.text) != (expected.reason, expected.text):
            raise WrongAnswer(f"ended by {reason!r} with {self.text!r} instead of {expected}")
        if self.tokens and self.tokens != list(expected.tokens):
            raise WrongAnswer(f"ended with tokens {self.tokens} instead of {list(expected.tokens)}")
        if expected.logprobs and expected.logprobs[0] is not None and self._num_scored != len(expected.tokens):
            raise WrongAnswer(f"{self._num_scored} log-probabilities of {len(expected.tokens)} tokens")

    @property
    def num_tokens(self) -> int:
        return len(self._expected.tokens)


class ForcedCheck:
    """One choice as it comes, in `fast`: each token must be what one of the models gives for the text before it.

    The models have equal KV.
    """

    def __init__(
        self, models: Sequence[MemorySettings], prompt: tuple[int, ...], sampling: Sampling, choice: int
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self._models = models
        self._prompt = prompt
        self._sampling = sampling
        self._choice = choice
        states = chain(root_state(models[0]), np.asarray(prompt, np.uint32))
        self._state = states[-1]
        self._lanes: Lanes = expand(models[0].kv_format, states)

    def take(self, text: str, token_ids: Sequence[int] | None, logprobs: Sequence[dict[str, Any]]) -> None:
        for token in token_ids or ():
            right = self._next_tokens()
            if token not in right:
                raise WrongAnswer(f"token {token} after {self.tokens} instead of one of {right}")
            self._append(token)
        self.text += text
        if not text_of(self.tokens).startswith(self.text.rstrip("\ufffd")):  # its text may lag behind
            raise WrongAnswer(f"text {self.text!r} of {self.tokens}")

    def end(self, reason: str) -> None:
        ended = bool(self.tokens) and self.tokens[-1] == EOS and not self._sampling.ignore_eos
        if reason != ("stop" if ended else "length") or (not ended and len(self.tokens) != self._sampling.max_tokens):
            raise WrongAnswer(f"ended by {reason!r} after {len(self.tokens)} of {self._sampling.max_tokens} tokens")
        if self.text != text_of(self.tokens):
            raise WrongAnswer(f"text {self.text!r} of {self.tokens}")

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def _next_tokens(self) -> list[int]:
        history = np.asarray([*self._prompt, *self.tokens], np.uint32)
        draw = Draw.of(
            self._sampling, self._choice, len(self.tokens), history, len(self._prompt), self._models[0].eos_token_ids
        )
        return [pick(self._lanes, draw, model)[0] for model in self._models]

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        states = chain(self._state, np.asarray([token], np.uint32))
        self._state = states[-1]
        self._lanes = np.concatenate((self._lanes, expand(self._models[0].kv_format, states)), axis=2)


class Check(Protocol):
    """What one choice of a client's answer is held against, as it comes."""

    tokens: list[int]
    text: str

    @property
    def num_tokens(self) -> int: ...

    def take(self, text: str, token_ids: Sequence[int] | None, logprobs: Sequence[dict[str, Any]]) -> None: ...

    def end(self, reason: str) -> None: ...
