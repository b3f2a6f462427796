"""Two models with one name are told apart by their vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from scripted_worker import write_model
from tokenizers import models

from kvferry.text.vocabulary import vocabulary_id


def written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_vocabulary_has_one_name_whatever_else_its_file_says(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m").tokenizer_path
    document = json.loads(path.read_text())
    name = vocabulary_id(path)
    assert len(name) == 32
    document["truncation"] = {"max_length": 5, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    vocab = document["model"]["vocab"]
    document["model"]["vocab"] = dict(reversed(vocab.items()))
    assert vocabulary_id(written(tmp_path / "again.json", document)) == name
    assert vocabulary_id(tmp_path / "again.json") == name


def test_another_vocabulary_has_another_name(tmp_path: Path) -> None:
    names = {
        vocabulary_id(write_model(tmp_path / "m").tokenizer_path),
        vocabulary_id(write_model(tmp_path / "b", backwards=True).tokenizer_path),
        vocabulary_id(write_model(tmp_path / "s", special=["<|x|>"]).tokenizer_path),
    }
    assert len(names) == 3


def test_every_kind_of_tokenizer_has_a_name_and_equal_vocabularies_equal_ones(tmp_path: Path) -> None:
    tokens = ["<unk>", "a", "b"]
    ids = {token: index for index, token in enumerate(tokens)}
    kinds = {
        "bpe": models.BPE(vocab=ids, merges=[], unk_token="<unk>"),
        "word": models.WordLevel(vocab=ids, unk_token="<unk>"),
        "piece": models.WordPiece(vocab=ids, unk_token="<unk>"),
        "unigram": models.Unigram([(token, -1.0) for token in tokens], unk_id=0),
    }
    names = set()
    for kind, model in kinds.items():
        tokenizers.Tokenizer(model).save(str(tmp_path / f"{kind}.json"))
        names.add(vocabulary_id(tmp_path / f"{kind}.json"))
    assert len(names) == 1
    assert "" not in names


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff", b'{"model": {"vocab": 3}}', b'{"model": {"vocab": {"a": -0.5}}}']
)
def test_what_is_no_tokenizer_has_no_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert vocabulary_id(path) == ""
    assert vocabulary_id(tmp_path / "missing.json") == ""
