"""Two libraries that make token masks from a JSON schema, each by its own calls, behind one small interface."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any, Protocol

import llguidance
import numpy as np
import tokenizers

from kvferry.grammar.compiler import LIMITS

Words = np.ndarray


class Refused(Exception):
    """The library says that it does not take a schema."""


class Matcher(Protocol):
    def mask(self, words: Words) -> None:
        """Which tokens may come next, as bits of int32 words [1, ceil(vocab / 32)]."""

    def accept(self, token: int) -> bool:
        """Take a token; False if it may not come next."""

    def may_end(self) -> bool: ...


class Rival(Protocol):
    name: str
    version: str

    def compile(self, schema: dict[str, Any]) -> Matcher:
        """Raises `Refused`."""


class LLGuidance:
    """As `kvferry.grammar` calls it."""

    name = "llguidance"

    def __init__(self, tokenizer: Path, vocab_size: int, eos: list[int]) -> None:
        self.version = importlib.metadata.version("llguidance")
        self._tokenizer = llguidance.LLTokenizer(tokenizer.read_text(), n_vocab=vocab_size, eos_token=eos)
        self._limits = llguidance.LLParserLimits(**LIMITS)

    def compile(self, schema: dict[str, Any]) -> Matcher:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise Refused(matcher.get_error())
        return _LLGuidanceMatcher(matcher)


class _LLGuidanceMatcher:
    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, words: Words) -> None:
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def accept(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def may_end(self) -> bool:
        return self._matcher.is_accepting()


class XGrammar:
    """As vLLM calls it, but for `strict_mode`, which would close every object that a schema leaves open.

    Raises ImportError where it is not installed.
    """

    name = "xgrammar"

    def __init__(self, tokenizer: Path, vocab_size: int, eos: list[int]) -> None:
        xgrammar: Any = importlib.import_module("xgrammar")
        self.version = importlib.metadata.version("xgrammar")
        self._xgrammar = xgrammar
        backend = tokenizers.Tokenizer.from_file(str(tokenizer))
        vocabulary = [backend.id_to_token(token) or "" for token in range(vocab_size)]
        described = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocab_size, stop_token_ids=eos
        )
        self._compiler = xgrammar.GrammarCompiler(described, max_threads=1, cache_enabled=False)

    def compile(self, schema: dict[str, Any]) -> Matcher:
        try:
            compiled = self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        except RuntimeError as error:
            raise Refused(str(error)) from None
        return _XGrammarMatcher(self._xgrammar.GrammarMatcher(compiled))


class _XGrammarMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, words: Words) -> None:
        self._matcher.fill_next_token_bitmask(words)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def may_end(self) -> bool:
        return bool(self._matcher.is_completed())
