"""Tiny random Hugging Face checkpoints, built in milliseconds, one for each family and feature."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 199
MAX_POSITION = 256
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


@dataclass(frozen=True)
class Shape:
    """What a tiny checkpoint exercises."""

    name: str
    family: str
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    hidden_size: int = 64
    fields: dict[str, Any] = field(default_factory=dict)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LINEAR = rope("linear", factor=2.0)

SHAPES = (
    Shape("llama-gqa3-tied", "llama", 9, 3, 64, 144, {"tie_word_embeddings": True}),
    Shape("llama-untied-biases", "llama", fields={"attention_bias": True, "mlp_bias": True}),
    Shape("llama-mqa-head80", "llama", 4, 1, 80),
    Shape("llama-mha-head96-llama3", "llama", 2, 2, 96, fields=LLAMA3),
    Shape("llama-linear", "llama", fields=LINEAR),
    Shape("mistral-head128", "mistral", 4, 2, 128, fields={"sliding_window": None}),
    Shape("mistral-window", "mistral", fields={"sliding_window": 24}),
    Shape("mistral-window-over-tile", "mistral", fields={"sliding_window": 80}),
    Shape("qwen2-yarn", "qwen2", fields={**YARN, "tie_word_embeddings": True}),
    Shape(
        "qwen2-upper-window",
        "qwen2",
        fields={"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    Shape("qwen3-qk-norm", "qwen3", 8, 2, 32, 64, {"attention_bias": True}),
)


def config_of(shape: Shape) -> PretrainedConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden_size,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return CONFIGS[shape.family](**(fields | shape.fields))


def build(shape: Shape, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """Save a random checkpoint of `shape` to `directory` (`save` goes to save_pretrained)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                # Wide enough that attention is not flat and logits spread over several units.
                parameter.mul_(6)
    model.to(dtype).save_pretrained(directory, **save)
    return directory


def reference_logits(directory: Path, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """transformers' eager logits [num_tokens, vocab], fp32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def edit_config(directory: Path, **fields: Any) -> None:
    """Change fields of config.json; the value `...` removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        if value is ...:
            config.pop(name, None)
        else:
            config[name] = value
    path.write_text(json.dumps(config))
