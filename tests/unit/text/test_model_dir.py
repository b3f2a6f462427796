"""Model directories: what is read, and that whatever is wrong with one is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvferry.errors import CheckpointError
from kvferry.text.model_dir import MAX_EOS_TOKENS, MAX_JSON_BYTES, MAX_TEMPLATE_BYTES, ModelDir

from .tiny_models import MakeModel

CONFIG = {"vocab_size": 100, "max_position_embeddings": 64, "eos_token_id": 7, "bos_token_id": 1}


def test_sizes_name_and_ids_come_from_config_json(make_model: MakeModel) -> None:
    model = ModelDir(make_model("ship", config=CONFIG))
    assert (model.name, model.vocab_size, model.max_context) == ("ship", 100, 64)
    assert (model.eos_token_ids, model.bos_token_id) == ((7,), 1)
    assert model.chat_template is None
    assert model.sampling.temperature is None


def test_generation_config_wins_over_config_and_gives_sampling_defaults(make_model: MakeModel) -> None:
    generation = {
        "eos_token_id": [3, 4], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1,
    }  # fmt: skip
    model = ModelDir(make_model(config=CONFIG, generation_config=generation))
    assert model.eos_token_ids == (3, 4)
    sampling = model.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.6, 0.9, 20, 0.1)
    assert sampling.repetition_penalty == 1.1
    assert sampling.unapplied == ()


def test_recommended_sampling_that_is_not_applied_is_named(make_model: MakeModel) -> None:
    generation = {"penalty_alpha": 0.6, "typical_p": 1.0, "num_beams": 1}
    model = ModelDir(make_model(config=CONFIG, generation_config=generation))
    assert model.sampling.unapplied == ("penalty_alpha",)


@pytest.mark.parametrize(
    ("template", "expected"),
    [("one", "one"), ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d")],
)
def test_the_chat_template_is_one_string_or_the_default_of_a_list(
    make_model: MakeModel, template: Any, expected: str
) -> None:
    assert ModelDir(make_model(tokenizer_config={"chat_template": template})).chat_template == expected


def test_a_chat_template_in_a_file_of_its_own_wins(make_model: MakeModel) -> None:
    path = make_model(tokenizer_config={"chat_template": "old"})
    (path / "chat_template.jinja").write_text("new")
    assert ModelDir(path).chat_template == "new"


def test_special_tokens_are_strings_or_objects(make_model: MakeModel) -> None:
    tokens = {"bos_token": {"content": "<b>", "lstrip": False}, "eos_token": "<e>", "pad_token": None}
    assert ModelDir(make_model(tokenizer_config=tokens)).special_tokens == {"bos_token": "<b>", "eos_token": "<e>"}


def test_a_path_that_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model directory") as caught:
        ModelDir(tmp_path / "absent")
    assert caught.value.path == str(tmp_path / "absent")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(make_model: MakeModel, file: str) -> None:
    path = make_model()
    (path / file).unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        ModelDir(path)
    assert caught.value.path == str(path / file)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "larger than"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_is_not_a_json_object_is_named(make_model: MakeModel, file: str, raw: bytes, problem: str) -> None:
    path = make_model()
    (path / file).write_bytes(raw)
    with pytest.raises(CheckpointError, match=problem) as caught:
        ModelDir(path)
    assert caught.value.path == str(path / file)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config", "vocab_size", None),
        ("config", "vocab_size", 0),
        ("config", "vocab_size", True),
        ("config", "vocab_size", "100"),
        ("config", "max_position_embeddings", -1),
        ("config", "max_position_embeddings", 1 << 40),
        ("config", "eos_token_id", 100),
        ("config", "eos_token_id", "7"),
        ("config", "bos_token_id", 1.5),
        ("generation_config", "eos_token_id", [1, -1]),
        ("generation_config", "eos_token_id", [1] * (MAX_EOS_TOKENS + 1)),
        ("generation_config", "temperature", -0.1),
        ("generation_config", "temperature", "hot"),
        ("generation_config", "top_p", 0),
        ("generation_config", "top_k", -5),
        ("generation_config", "min_p", 2),
        ("generation_config", "repetition_penalty", 0),
        ("tokenizer_config", "bos_token", 5),
        ("tokenizer_config", "chat_template", {"default": "x"}),
        ("tokenizer_config", "chat_template", [{"name": "other", "template": "x"}]),
        ("tokenizer_config", "chat_template", "x" * (MAX_TEMPLATE_BYTES + 1)),
    ],
)
def test_a_field_of_a_wrong_value_is_named_with_its_file(
    make_model: MakeModel, file: str, field: str, value: object
) -> None:
    content = {**(CONFIG if file == "config" else {}), field: value}
    path = make_model(**{"config": CONFIG, file: content})
    with pytest.raises(CheckpointError, match=field) as caught:
        ModelDir(path)
    assert caught.value.path == str(path / f"{file}.json")


def test_not_a_number_is_no_temperature(make_model: MakeModel) -> None:
    path = make_model()
    (path / "generation_config.json").write_text(json.dumps({"temperature": float("nan")}))
    with pytest.raises(CheckpointError, match="temperature"):
        ModelDir(path)
