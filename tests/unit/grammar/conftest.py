"""A model with one token per byte: what a mask allows can be read as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_worker import EOS, write_model

from kvferry.grammar.compiler import GrammarCompiler

VOCAB_SIZE = 400  # EOS, the 256 bytes, and logits without a token, as large models have them


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("bytes")).tokenizer_path


@pytest.fixture(scope="session")
def compiler(tokenizer_path: Path) -> GrammarCompiler:
    return GrammarCompiler(tokenizer_path, VOCAB_SIZE, frozenset({EOS}))
