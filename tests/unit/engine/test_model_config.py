"""config.json: both spellings of RoPE, defaults of the families, and errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA3, YARN, Shape, config_of

from kvferry.engine.config import ModelConfig
from kvferry.errors import CheckpointError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def read(directory: Path, generation: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps({**BASE, **fields}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.read(directory)


@pytest.mark.parametrize("fields", [LLAMA3, YARN, {}], ids=["llama3", "yarn", "default"])
def test_old_and_new_spelling_of_rope_mean_the_same(tmp_path: Path, fields: dict[str, Any]) -> None:
    new = json.loads(config_of(Shape("x", "llama", fields=fields)).to_json_string())
    new["architectures"] = ["LlamaForCausalLM"]
    parameters = dict(new["rope_parameters"])
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    old["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    old["rope_scaling"] = parameters if parameters["type"] != "default" else None
    assert read(tmp_path, **new) == read(tmp_path, **old)


def test_yarn_reaches_its_stretched_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = read(tmp_path, architectures=["Qwen2ForCausalLM"], num_key_value_heads=2, rope_scaling=scaling)
    assert config.max_context == 2048
    assert config.rope.attention_factor == pytest.approx(1.138629, abs=1e-6)


def test_windows_follow_the_family(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert read(tmp_path, **mistral).windows == (4096, 4096)
    assert read(tmp_path, **mistral, sliding_window=None).windows == (None, None)
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 8}
    assert read(tmp_path, **qwen).windows == (None, None)
    assert read(tmp_path, **qwen, use_sliding_window=True, max_window_layers=1).windows == (None, 8)
    types = ["sliding_attention", "full_attention"]
    assert read(tmp_path, **qwen, use_sliding_window=True, layer_types=types).windows == (8, None)


def test_biases_and_norms_follow_the_family(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, architectures=["Qwen2ForCausalLM"], num_key_value_heads=2)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read(tmp_path, architectures=["Qwen3ForCausalLM"], num_key_value_heads=2)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    llama = read(tmp_path, attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.num_kv_heads) == (True, True, True, 4)


def test_end_of_sequence_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=2).eos_token_ids == {2}
    assert read(tmp_path, {"eos_token_id": [2, 7]}, eos_token_id=2).eos_token_ids == {2, 7}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", None),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("num_key_value_heads", 3),
        ("hidden_size", 65),
        ("hidden_size", "64"),
        ("hidden_size", None),
        ("vocab_size", -1),
        ("vocab_size", True),
        ("num_hidden_layers", 1 << 20),
        ("head_dim", 15),
        ("dtype", "int4"),
        ("rms_norm_eps", 0),
        ("tie_word_embeddings", "yes"),
        ("layer_types", ["sliding_attention"] * 2),
        ("eos_token_id", "</s>"),
        ("rope_theta", -1),
    ],
)
def test_a_wrong_or_unsupported_field_is_named(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, **{field: value})
    assert error.value.path.endswith("config.json")
    assert error.value.problem.startswith(f"{field}:")


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"rope_type": "longrope"}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({"rope_type": "yarn", "factor": 0}, "factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_wrong_rope_field_is_named(tmp_path: Path, parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, rope_parameters=parameters)
    assert error.value.path.endswith("config.json: rope_parameters")
    assert error.value.problem.startswith(f"{field}:")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        ModelConfig.read(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.read(tmp_path)
