"""Model directories without weights, and a loaded tokenizer of each kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer

from .tiny_models import MakeModel, byte_level_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Writes a model directory without weights; keyword arguments are its files' contents."""

    def make(name: str = "tiny", tokenizer: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        tokenizer = tokenizer or byte_level_tokenizer()
        tokenizer.save(str(path / "tokenizer.json"))
        config = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 128, "eos_token_id": 1}
        for file, content in {"config": config, **files}.items():
            (path / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A loaded tokenizer of each kind. They keep no state, so tests share them."""
    builders = {
        "byte-level": byte_level_tokenizer,
        "sentencepiece": sentencepiece_tokenizer,
        "wordpiece": wordpiece_tokenizer,
    }
    loaded = {}
    for kind, build in builders.items():
        path = tmp_path_factory.mktemp(kind)
        built = build()
        built.save(str(path / "tokenizer.json"))
        config = {"vocab_size": built.get_vocab_size(), "max_position_embeddings": 128}
        (path / "config.json").write_text(json.dumps(config))
        loaded[kind] = Tokenizer(ModelDir(path))
    return loaded
