"""How tokens are drawn, how likely they were, and what their text must be."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from kvferry.wire.codec import Message
from kvferry.wire.fields import U32, U64, Count

MAX_REPETITION_PENALTY: Final = 100
MAX_LOGPROBS: Final = 20  # best tokens told beside a drawn one
MAX_LOGIT_BIAS: Final = 1024  # entries of one request
MAX_TOKEN_LIST: Final = 1024  # stop tokens, or banned tokens, of one request
MAX_GRAMMAR_CHARS: Final = 1 << 17  # of a grammar's source

GrammarKind = Literal["json", "regex", "choice", "grammar", "tagged"]


class Grammar(Message, frozen=True):
    """What the text of a choice must be. Each worker follows it from the source and the generated tokens alone.

    json     a JSON Schema
    regex    a regular expression (Rust's syntax) that the whole text matches
    choice   a JSON list of the texts that may be
    grammar  context-free: Lark as llguidance has it, or GBNF
    tagged   free text with parts that follow a schema: JSON of {"lark": Lark, "schemas": {name that it uses: schema}}
    """

    kind: GrammarKind
    source: Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)]
    after: U32 | None = None  # the grammar begins behind the first of this token in the generated text


class Sampling(Message, frozen=True):
    """How the tokens of one sequence are drawn and when they end."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0  # 0: no limit
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: U64 = 0
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 32)] = 16  # of the whole choice, over all attempts; 0: only scored
    ignore_eos: bool = False
    # As in vLLM: the first two count generated tokens, the last one looks at the prompt too.
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=MAX_REPETITION_PENALTY)] = 1.0
    logit_bias: Annotated[
        tuple[tuple[U32, Annotated[float, Meta(ge=-100, le=100)]], ...], Meta(max_length=MAX_LOGIT_BIAS)
    ] = ()  # (token, what is added to its logit)
    min_tokens: Count = 0  # of the whole choice: until then nothing that ends it is drawn
    stop_token_ids: Annotated[tuple[U32, ...], Meta(max_length=MAX_TOKEN_LIST)] = ()  # end it, beside EOS
    banned: Annotated[tuple[U32, ...], Meta(max_length=MAX_TOKEN_LIST)] = ()  # never drawn
    num_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None  # None: no log-probability wanted
    grammar: Grammar | None = None  # None: any text

    @property
    def penalised(self) -> bool:
        """Whether a draw depends on which tokens came before it, apart from the model."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def ends_at_eos(self) -> bool:
        """A grammar lets EOS be drawn only where it may end."""
        return not self.ignore_eos or self.grammar is not None

    def is_end(self, token: int, eos_token_ids: frozenset[int]) -> bool:
        """Whether a drawn token is the last one by what it is."""
        return (self.ends_at_eos and token in eos_token_ids) or token in self.stop_token_ids

    def banned_at(self, index: int, eos_token_ids: frozenset[int]) -> tuple[int, ...]:
        """What must not be drawn at a generated index, ends of the choice among it before `min_tokens`."""
        early = index < self.min_tokens
        # With a grammar EOS is only kept away while that has anything else: see `Draw.allowed`.
        no_eos = (early and not self.ignore_eos) if self.grammar is None else (early or self.ignore_eos)
        if not early and not no_eos:
            return self.banned
        return (*self.banned, *(sorted(eos_token_ids) if no_eos else ()), *(self.stop_token_ids if early else ()))


class Scoring(Message, frozen=True):
    """Log-probabilities of the prompt's own tokens are wanted, from whoever computes the prompt."""

    num_top: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]  # best tokens told beside each one
    start: Annotated[int, Meta(ge=1, le=(1 << 32) - 1)] = 1  # position of the first token that lacks them
