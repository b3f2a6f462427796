"""The tiny model's tokenizer and template, and grammars on it."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path

from scripted_worker import EOS, VOCAB_SIZE, write_model

from kvferry.grammar.compiler import GrammarCompiler
from kvferry.grammar.mask import GrammarMask
from kvferry.schedule.step import NO_TOKENS
from kvferry.text.model_dir import ModelDir
from kvferry.wire.sampling import Grammar


@cache
def model_dir() -> ModelDir:
    """Its files are read when a gateway starts."""
    directory = tempfile.TemporaryDirectory(prefix="kvferry-simulation-")
    atexit.register(directory.cleanup)
    return write_model(Path(directory.name), max_context=1024)


@cache
def compiler() -> GrammarCompiler:
    """One for all processes: they share what it keeps, and nothing that it says."""
    return GrammarCompiler(model_dir().tokenizer_path, VOCAB_SIZE, frozenset({EOS}))


def mask_of(grammar: Grammar | None) -> GrammarMask | None:
    """A new one, at the start of the text."""
    return None if grammar is None else compiler().follow(grammar, NO_TOKENS)
