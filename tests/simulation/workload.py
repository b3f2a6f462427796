"""Requests from one seed: mixed lengths, shared prefixes, greedy and seeded draws, staggered arrivals."""

from __future__ import annotations

import random
from dataclasses import dataclass

from cluster import expected

from kvferry.engine.memory import MemorySettings
from kvferry.wire.messages import Sampling

EOS = 0
VOCAB_SIZE = 257  # EOS and one token per byte
MODEL = MemorySettings(
    num_blocks=128,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({EOS}),
    seconds_per_step=0.004,
    seconds_per_token=0.001,
)
MAX_PROMPT = 600
MAX_TOKENS = 48
NUM_SHARED = 3


@dataclass(frozen=True)
class ClientRequest:
    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    arrival: float  # seconds after the start

    def answer(self, model: MemorySettings = MODEL) -> list[int]:
        """The tokens that it must get from workers of `model`."""
        tokens = expected(list(self.prompt), self.sampling, self.sampling.max_tokens, model)
        if EOS in tokens and not self.sampling.ignore_eos:
            return tokens[: tokens.index(EOS) + 1]
        return tokens


def requests(seed: int, count: int, *, seconds: float = 4.0, max_prompt: int = MAX_PROMPT) -> list[ClientRequest]:
    """`count` requests that arrive within `seconds`. Most prompts are short, some as long as `max_prompt`; two of
    five begin with one of a few shared texts."""
    chance = random.Random(seed)
    shared = [_tokens(chance, max_prompt // (2 + number)) for number in range(NUM_SHARED)]
    made: list[ClientRequest] = []
    for number, arrival in enumerate(sorted(chance.uniform(0, seconds) for _ in range(count))):
        prompt = _tokens(chance, max(1, round(max_prompt ** chance.random())))
        if chance.random() < 0.4:
            prompt = (chance.choice(shared) + prompt)[:max_prompt]
        sampling = Sampling(
            temperature=chance.choice((0.0, 0.8)),
            seed=chance.getrandbits(64),
            max_tokens=chance.randint(1, MAX_TOKENS),
            ignore_eos=chance.random() < 0.5,
            presence_penalty=0.5 if number % 3 == 0 else 0.0,
        )
        made.append(ClientRequest(number, prompt, sampling, arrival))
    return made


def _tokens(chance: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chance.randrange(VOCAB_SIZE) for _ in range(count))
