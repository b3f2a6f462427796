"""From a grammar's source to masks over one model's vocabulary.

What a compilation may take is bounded by sizes and fuel, not by a clock: what the gateway could compile every worker
can.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import llguidance

from kvferry.errors import KvferryError
from kvferry.grammar.mask import MAX_FAULT_CHARS, GrammarMask
from kvferry.schedule.step import NO_TOKENS
from kvferry.text.tokenizer import MAX_TOKENIZER_BYTES
from kvferry.wire.fields import TokenArray
from kvferry.wire.sampling import Grammar

MAX_COMPILED: Final = 32  # grammars that are kept for requests to come
MAX_PATTERN_CHARS: Final = 4096  # of one regular expression: compiling takes the square of its length
MAX_LARK_CHARS: Final = 1 << 15  # of a context-free grammar
# In llguidance's units, whose speed its documentation tells. With these a schema of 128 KiB takes up to half a second
# to compile, the first mask as long, a later one 20 ms, and what a kept grammar learns 20 MB.
LIMITS: Final[Any] = {
    "max_grammar_size": 200_000,  # symbols
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 10_000,
    "verbose_errors": False,  # they would hold what was generated
}
# Any layout of JSON that people write, but no white space without end: small models don't find out of it.
_DEFAULTS: Final[Any] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
_STRICT: Final[Any] = {"lenient": False, "coerce_one_of": False}  # no keyword of a schema is left out in silence
_PATTERN_KEYS: Final = ("pattern", "whitespace_pattern", "item_separator", "key_separator")
_LARK_PATTERN: Final = re.compile(r"/(?:\\.|[^/\\\n])*/")


class GrammarError(KvferryError):
    """A grammar that can't be compiled or followed. `reason` may quote its source: it is for the client alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class GrammarCompiler:
    """One model's. Blocking; one call at a time.

    Make it before the process serves: it holds the GIL for some 0.3 s (a vocabulary of 50,000) to 1 s (150,000), and no
    heartbeat leaves meanwhile. Everything else lets go of it.
    """

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        """`vocab_size`: of the logits, which may be more than the tokenizer has. A tokenizer that can't be used is no
        error yet, but one of each grammar."""
        self._vocab_size = vocab_size
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._obstacle = ""
        try:
            self._tokenizer = _tokenizer(tokenizer_path, vocab_size, eos_token_ids)
        except GrammarError as error:
            self._obstacle = error.reason
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raises `GrammarError` for one that can't be compiled or that no text follows."""
        # From the start of the text, also where the grammar begins later.
        self._stand(grammar, None, NO_TOKENS)

    def follow(self, grammar: Grammar, generated: TokenArray) -> GrammarMask:
        """A mask that stands behind the generated tokens [num_generated]. Raises `GrammarError`."""
        return self._stand(grammar, grammar.after, generated)

    def forget(self, grammar: Grammar) -> None:
        """It has failed: what it has learnt may be all that its limits allow, and would fail the next request too."""
        self._compiled.pop((grammar.kind, grammar.source), None)

    def _stand(self, grammar: Grammar, after: int | None, generated: TokenArray) -> GrammarMask:
        mask = GrammarMask(self._matcher(grammar), self._vocab_size, after)
        mask.advance(generated)
        if mask.fault is not None:
            self.forget(grammar)
            raise GrammarError(mask.fault)
        return mask

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """One of its own. Copies share what the lexer has learnt so far."""
        key = (grammar.kind, grammar.source)
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compiled[key] = self._compile(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return matcher.deep_copy()

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if self._tokenizer is None:
            raise GrammarError(self._obstacle)
        matcher = llguidance.LLMatcher(self._tokenizer, _spelled(grammar), log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(matcher.get_error()[:MAX_FAULT_CHARS])
        return matcher


def _tokenizer(path: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> llguidance.LLTokenizer:
    if not eos_token_ids:
        raise GrammarError("the model has no token that ends a text")
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_TOKENIZER_BYTES).decode()
        return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
    except (OSError, ValueError) as error:
        raise GrammarError(f"the model's tokenizer is of a kind that grammars are not for: {error}") from None


def _spelled(grammar: Grammar) -> str:
    """The grammar as llguidance takes it. Raises `GrammarError`."""
    source = grammar.source
    try:
        match grammar.kind:
            case "json":
                _bound(_patterns(json.loads(source)))
                return llguidance.LLMatcher.grammar_from_json_schema(source, _DEFAULTS, _STRICT)
            case "regex":
                _bound([source])
                return llguidance.LLMatcher.grammar_from_regex(source)
            case "choice":
                texts = json.loads(source)
                if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                    raise GrammarError("not a list of texts")
                return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))
            case "grammar":
                if len(source) > MAX_LARK_CHARS:
                    raise GrammarError(f"longer than {MAX_LARK_CHARS} characters")
                _bound(found[0] for found in _LARK_PATTERN.finditer(source))
                return llguidance.grammar_from("grammar", source)
            case "tagged":
                parts = json.loads(source)
                schemas = [_named(name, schema) for name, schema in parts["schemas"].items()]
                return json.dumps({"grammars": [{"name": "text", "lark_grammar": parts["lark"]}, *schemas]})
    except (ValueError, RecursionError) as error:
        raise GrammarError(str(error)[:MAX_FAULT_CHARS]) from None


def _named(name: str, schema: Any) -> Any:
    """A schema as a part of a larger grammar."""
    _bound(_patterns(schema))
    alone = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), _DEFAULTS, _STRICT)
    return {**json.loads(alone)["grammars"][0], "name": name}


def _bound(patterns: Iterable[str]) -> None:
    if any(len(pattern) > MAX_PATTERN_CHARS for pattern in patterns):
        raise GrammarError(f"a regular expression is longer than {MAX_PATTERN_CHARS} characters")


def _patterns(schema: Any) -> Iterator[str]:
    """The regular expressions anywhere in a JSON schema, and what looks like some."""
    if isinstance(schema, list):
        for part in schema:
            yield from _patterns(part)
    elif isinstance(schema, dict):
        for key, part in schema.items():
            if key in _PATTERN_KEYS and isinstance(part, str):
                yield part
            elif key == "patternProperties" and isinstance(part, dict):
                yield from part
            yield from _patterns(part)
