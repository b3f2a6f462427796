"""Encoding with a model's own tokenizer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import CheckpointError
from kvferry.text.errors import InvalidTextError
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer

from .tiny_models import MakeModel, byte_level_tokenizer


@given(text=st.text(max_size=200))
def test_byte_level_text_survives_the_round_trip(kinds: dict[str, Tokenizer], text: str) -> None:
    tokenizer = kinds["byte-level"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<|bos|>" + text


def test_a_bare_prompt_gets_its_special_tokens_and_a_rendered_chat_does_not(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    prompt, chat = tokenizer.encode("ferry"), tokenizer.encode_chat("ferry")
    assert prompt.dtype == np.uint32
    assert prompt.tolist() == [tokenizer.backend.token_to_id("<|bos|>"), *chat.tolist()]


def test_special_tokens_in_a_rendered_chat_become_single_tokens(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    assert tokenizer.encode_chat("<|end|>").tolist() == [tokenizer.backend.token_to_id("<|end|>")]


def test_empty_text_has_no_tokens(kinds: dict[str, Tokenizer]) -> None:
    assert kinds["byte-level"].encode_chat("").shape == (0,)


def test_a_lone_surrogate_is_refused_with_its_position(kinds: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidTextError) as caught:
        kinds["byte-level"].encode("ok \ud800")
    assert caught.value.position == 3


def test_truncation_and_padding_left_in_the_file_do_not_apply(make_model: MakeModel) -> None:
    built = byte_level_tokenizer()
    built.enable_truncation(4)
    built.enable_padding(length=64)
    assert len(built.encode("a" * 50).ids) == 64  # the file's own settings do bite
    tokenizer = Tokenizer(ModelDir(make_model(tokenizer=built)))
    assert tokenizer.decode(tokenizer.encode("a b" * 50)) == "a b" * 50


def test_special_ids_come_from_the_names_in_tokenizer_config(make_model: MakeModel) -> None:
    config = {"vocab_size": 1000, "max_position_embeddings": 64}
    path = make_model(config=config, tokenizer_config={"bos_token": "<|bos|>", "eos_token": "<|end|>"})
    tokenizer = Tokenizer(ModelDir(path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1,))
    assert tokenizer.special_token_ids == {0, 1}
    assert tokenizer.vocab_size == byte_level_tokenizer().get_vocab_size()


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Nonsense"}}'])
def test_a_malformed_tokenizer_json_is_named(make_model: MakeModel, raw: bytes) -> None:
    path = make_model()
    (path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a tokenizer") as caught:
        Tokenizer(ModelDir(path))
    assert caught.value.path == str(path / "tokenizer.json")
