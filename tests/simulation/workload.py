"""Requests from one seed: all forms of the API, mixed lengths, shared prefixes, clients that leave or read slowly."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import msgspec
from answers import Expected, expected_of
from lanes import SECONDS_PER_STEP, SECONDS_PER_TOKEN
from scripted_worker import EOS, VOCAB_SIZE, text_of, tokens_of

from kvferry.engine.memory.runner import MemorySettings, scored_prompt
from kvferry.wire.sampling import Grammar, Sampling

MODEL = MemorySettings(
    num_blocks=128,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({EOS}),
    head_dim=4,
    seconds_per_step=SECONDS_PER_STEP,
    seconds_per_token=SECONDS_PER_TOKEN,
)
MODEL_NAME = "memory"
MAX_PROMPT = 400
MAX_TOKENS = 56
LONG_TOKENS = 300  # of a few
NUM_SHARED = 3
STRUCTURED: dict[Grammar, dict[str, Any]] = {
    Grammar("regex", "(ab|cd?){4,9}!"): {"regex": "(ab|cd?){4,9}!"},
    Grammar("choice", '["left","right","straight on"]'): {"choice": ["left", "right", "straight on"]},
    Grammar("json", '{"type":"object"}'): {"json_object": True},
}
# Many prompts have just this length: only their hashes tell two hand-offs of them apart.
COMMON_LENGTH = 96

Form = Literal["ids", "text", "chat"]


@dataclass(frozen=True)
class ClientRequest:
    """One request as its client makes it. `prompt`: the tokens that the model must see."""

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    arrival: float  # seconds after the load began
    form: Form = "ids"
    text: str = ""  # of the prompt, or of the user's message
    stream: bool = True
    n: int = 1
    stops: tuple[str, ...] = ()
    wants_ids: bool = False  # tells token ids
    echo: bool = False  # begins with its prompt, and tells how likely that is
    num_prompt_top: int | None = None  # best tokens told beside each one of the prompt
    model: str = MODEL_NAME
    direct: bool = True  # the server hands its socket to the route; else plain ASGI
    leaves_after: float | None = None  # seconds; then the client closes its connection
    stops_reading_at: int | None = None  # events; then it reads nothing for `pause_s`
    pause_s: float = 0.0

    @property
    def label(self) -> str:
        return f"r{self.number}"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.form == "chat" else "/v1/completions"

    def body(self) -> bytes:
        sampling = self.sampling
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "ignore_eos": sampling.ignore_eos,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "logit_bias": {str(token): bias for token, bias in sampling.logit_bias},
            "stop_token_ids": list(sampling.stop_token_ids),
            "min_tokens": sampling.min_tokens,
            "stream": self.stream,
            "n": self.n,
            "return_token_ids": self.wants_ids,
        }
        if self.stream:
            fields["stream_options"] = {"include_usage": True}
        if self.stops:
            fields["stop"] = list(self.stops)
        if sampling.grammar is not None:
            fields["structured_outputs"] = STRUCTURED[sampling.grammar]
        if self.echo:
            fields["echo"] = True
        if self.num_prompt_top is not None:
            fields["prompt_logprobs"] = self.num_prompt_top
        if self.form == "chat":
            fields["messages"] = [{"role": "user", "content": self.text}]
            if sampling.num_logprobs is not None:
                fields |= {"logprobs": True, "top_logprobs": sampling.num_logprobs}
        else:
            fields["prompt"] = list(self.prompt) if self.form == "ids" else self.text
            if sampling.num_logprobs is not None:
                fields["logprobs"] = sampling.num_logprobs
        return json.dumps(fields).encode()

    @cached_property
    def expected(self) -> tuple[Expected, ...]:
        """What an undisturbed run gives each choice, on workers of `MODEL`."""
        return self.expected_on(MODEL)

    def expected_on(self, model: MemorySettings) -> tuple[Expected, ...]:
        return tuple(expected_of(model, self.prompt, self.sampling, choice, self.stops) for choice in range(self.n))

    @property
    def echoed(self) -> str:
        """What its answers begin with."""
        return text_of(self.prompt) if self.echo else ""

    @cached_property
    def prompt_logprobs(self) -> tuple[float, ...]:
        """Of all tokens of its prompt but the first, on any worker: all models here have equal KV."""
        return tuple(row.logprob for row in scored_prompt(MODEL, self.prompt, 0))

    def answer(self, model: MemorySettings = MODEL) -> list[int]:
        """The tokens of its first choice."""
        return list(self.expected_on(model)[0].tokens)


def requests(
    seed: int | str, count: int, *, seconds: float = 4.0, max_prompt: int = MAX_PROMPT, long_tokens: int = LONG_TOKENS
) -> list[ClientRequest]:
    """`count` plain streams that arrive within `seconds`. Most prompts are short, some as long as `max_prompt`; two of
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
            seed=chance.getrandbits(63),
            max_tokens=chance.randint(1, long_tokens if chance.random() < 0.08 else MAX_TOKENS),
            ignore_eos=chance.random() < 0.5,
            presence_penalty=0.5 if number % 3 == 0 else 0.0,
        )
        made.append(ClientRequest(number, prompt, sampling, arrival, direct=chance.random() < 0.5))
    return made


def mixed_requests(
    seed: int | str, count: int, *, seconds: float, max_prompt: int, long_tokens: int, forced: bool
) -> list[ClientRequest]:
    """As `requests`, in every form of the API. `forced`: only what tells its token ids, one by one."""
    chance = random.Random(f"forms {seed}")
    plain = requests(seed, count, seconds=seconds, max_prompt=max_prompt, long_tokens=long_tokens)
    return [_formed(chance, request, forced=forced) for request in plain]


def _formed(chance: random.Random, plain: ClientRequest, *, forced: bool) -> ClientRequest:
    if chance.random() < 0.3:
        plain = replace(plain, prompt=_tokens(chance, COMMON_LENGTH))
    form: Form = chance.choice(("ids", "ids", "text", "chat"))
    if form != "ids":
        text = "".join(chance.choice("abcdefgh ij") for _ in range(len(plain.prompt))).strip() or "a"
        rendered = f"user:{text}\nassistant:" if form == "chat" else text
        plain = replace(plain, form=form, text=text, prompt=tuple(tokens_of(rendered)))
    made = replace(
        plain,
        stream=forced or chance.random() < 0.8,
        wants_ids=forced or chance.random() < 0.4,
        leaves_after=chance.uniform(0.0, 1.2) if chance.random() < 0.12 else None,
        stops_reading_at=chance.randrange(20) if chance.random() < 0.12 else None,
        pause_s=chance.uniform(0.05, 1.5),
    )
    if forced:
        return made
    sampling = made.sampling
    if chance.random() < 0.2:
        sampling = replace_sampling(sampling, num_logprobs=chance.randrange(4))
    if chance.random() < 0.15:
        sampling = replace_sampling(sampling, min_tokens=chance.randint(0, sampling.max_tokens))
    if chance.random() < 0.15:
        made = replace(made, n=chance.randint(2, 3))
    if chance.random() < 0.15:
        penalties = {"frequency_penalty": chance.uniform(-1, 2), "repetition_penalty": chance.uniform(0.5, 2)}
        sampling = replace_sampling(sampling, **penalties)
    if chance.random() < 0.15:
        bias = tuple((token, chance.uniform(-100, 8)) for token in sorted(chance.sample(range(VOCAB_SIZE), 5)))
        sampling = replace_sampling(sampling, logit_bias=bias)
    if chance.random() < 0.15:
        sampling = replace_sampling(sampling, stop_token_ids=tuple(chance.sample(range(1, VOCAB_SIZE), 4)))
    if chance.random() < 0.12:
        sampling = replace_sampling(sampling, grammar=chance.choice(list(STRUCTURED)))
    if chance.random() < 0.12:
        if not made.stream:
            made = replace(made, num_prompt_top=chance.randrange(3))
        elif made.form != "chat" and text_of(made.prompt).isascii():
            made = replace(made, echo=True)
            sampling = replace_sampling(sampling, num_logprobs=chance.randrange(2))
    made = replace(made, sampling=sampling)
    if chance.random() < 0.2:
        text = text_of(made.expected[0].tokens)
        places = [i for i in range(len(text) - 1) if text[i].isascii() and text[i + 1].isascii()]
        if places:
            place = chance.choice(places)
            made = replace(made, stops=(text[place : place + chance.randint(1, 2)], "never to be seen"))
    return made


def replace_sampling(sampling: Sampling, **fields: Any) -> Sampling:
    return msgspec.structs.replace(sampling, **fields)


def _tokens(chance: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chance.randrange(VOCAB_SIZE) for _ in range(count))
