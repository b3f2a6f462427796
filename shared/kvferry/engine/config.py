"""The shape of a model, read from a Hugging Face `config.json` and checked field by field.

Both spellings of the RoPE settings are understood: `rope_theta` with `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5). A field that names something this engine does not compute is a
`CheckpointError` naming the field, never ignored: a wrong model would answer fluently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvferry.errors import CheckpointError

MAX_CONFIG_BYTES: Final = 4 << 20
MAX_LAYERS: Final = 1024
MAX_DIMENSION: Final = 1 << 24
DTYPES: Final = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture implies where its config.json is silent."""

    qkv_bias: bool | None  # None: `attention_bias` tells
    output_bias: bool  # True: `attention_bias` covers o_proj too
    mlp_bias: bool  # True: `mlp_bias` is a field of this family
    qk_norm: bool
    window: str  # "none" | "all_layers" | "upper_layers"
    num_kv_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: hidden_size / num_attention_heads
    sliding_window: int | None


FAMILIES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": Family(None, True, True, False, "none", None, None, None),
    "MistralForCausalLM": Family(False, False, False, False, "all_layers", 8, None, 4096),
    "Qwen2ForCausalLM": Family(True, False, False, False, "upper_layers", 32, None, 4096),
    "Qwen3ForCausalLM": Family(None, True, False, True, "upper_layers", 32, 128, 4096),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields beyond `theta` matter only to the kinds that use them."""

    kind: str  # "default" | "linear" | "llama3" | "yarn"
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: scales cos and sin


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama shape."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # [num_layers]: attended positions, the own one included; None: all
    rope: RopeConfig
    dtype: str  # of the checkpoint
    eos_token_ids: frozenset[int]

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def max_context(self) -> int:
        """Positions that the RoPE settings were made for."""
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.factor * self.rope.original_max_position))
        return self.max_position_embeddings

    @classmethod
    def read(cls, model_dir: Path) -> ModelConfig:
        """From `config.json` and, for the end-of-sequence ids, `generation_config.json`."""
        path = model_dir / "config.json"
        fields = Fields(str(path), _read_json(path))
        generation = model_dir / "generation_config.json"
        eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
        return parse(fields, fields.raw.get("eos_token_id") if eos is None else eos)


class Fields:
    """Typed access to the fields of one config.json; every error names the field."""

    def __init__(self, path: str, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw

    def fail(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(self.path, f"{name}: {problem}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise self.fail(name, "missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DIMENSION:
            raise self.fail(name, f"{value!r} is not an integer from 1 to {MAX_DIMENSION}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise self.fail(name, "missing")
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.fail(name, f"{value!r} is not a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, f"{value!r} is not true or false")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(str(path), f"{size} bytes, limit {MAX_CONFIG_BYTES}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(str(path), error.strerror or "cannot be read") from None
    except (ValueError, RecursionError):
        raise CheckpointError(str(path), "not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "not a JSON object")
    return value


def parse(fields: Fields, eos: object) -> ModelConfig:
    """Raises `CheckpointError` for what is missing, malformed or not supported."""
    architectures = fields.raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise fields.fail("architectures", f"{architectures!r}, supported: {', '.join(FAMILIES)}")
    architecture: str = architectures[0]
    family = FAMILIES[architecture]
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise fields.fail("num_hidden_layers", f"{num_layers}, limit {MAX_LAYERS}")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", family.num_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise fields.fail("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads")
    if fields.raw.get("head_dim") is None and family.head_dim is None and hidden_size % num_heads:
        raise fields.fail("hidden_size", f"{hidden_size} is not a multiple of {num_heads} heads")
    head_dim = fields.integer("head_dim", family.head_dim or max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise fields.fail("head_dim", f"{head_dim} is odd")
    dtype = fields.raw.get("dtype") or fields.raw.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise fields.fail("dtype", f"{dtype!r}, supported: {', '.join(DTYPES)}")
    max_position = fields.integer("max_position_embeddings", 2048)
    attention_bias = fields.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=max_position,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias and family.output_bias,
        mlp_bias=fields.flag("mlp_bias") and family.mlp_bias,
        qk_norm=family.qk_norm,
        windows=_windows(fields, family, num_layers),
        rope=_rope(fields, max_position),
        dtype=dtype,
        eos_token_ids=_eos(fields, eos),
    )


def _refuse_unsupported(fields: Fields) -> None:
    if fields.raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.fail("hidden_act", f"{fields.raw['hidden_act']!r}, supported: silu")
    for name in ("quantization_config", "quantization"):
        if fields.raw.get(name) is not None:
            raise fields.fail(name, "quantized weights are not supported")
    for name in ("pretraining_tp", "partial_rotary_factor"):
        if fields.raw.get(name) not in (None, 1, 1.0):
            raise fields.fail(name, f"{fields.raw[name]!r}, supported: 1")


def _windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.window == "none" or (family.window == "upper_layers" and not fields.flag("use_sliding_window")):
        _check_layer_types(fields, num_layers, {"full_attention"})
        return (None,) * num_layers
    # An explicit null means no window; a missing field means the family's default.
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return (None,) * num_layers
    window = fields.integer("sliding_window", family.sliding_window)
    if family.window == "all_layers":
        return (window,) * num_layers
    types = _check_layer_types(fields, num_layers, {"full_attention", "sliding_attention"})
    if types is None:
        first = fields.raw.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            raise fields.fail("max_window_layers", f"{first!r} is not a count of layers")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _check_layer_types(fields: Fields, num_layers: int, supported: set[str]) -> list[str] | None:
    types = fields.raw.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in supported for kind in types):
        raise fields.fail("layer_types", f"must name {num_layers} of {', '.join(sorted(supported))}")
    return types


def _rope(fields: Fields, max_position: int) -> RopeConfig:
    old, new = fields.raw.get("rope_scaling"), fields.raw.get("rope_parameters")
    name = "rope_scaling" if new is None else "rope_parameters"
    raw = (old if new is None else new) or {}
    if not isinstance(raw, dict):
        raise fields.fail(name, "not a JSON object")
    rope = Fields(f"{fields.path}: {name}", raw)
    kind = raw.get("rope_type") or raw.get("type") or "default"
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.fail("partial_rotary_factor", f"{raw['partial_rotary_factor']!r}, supported: 1")
    if kind == "default":
        return RopeConfig("default", theta)
    if kind == "linear":
        return RopeConfig("linear", theta, rope.number("factor"))
    # A top-level field (as Phi-3 has it) comes before the one among the RoPE settings, as in transformers.
    original = fields.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position)
    )
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.fail("high_freq_factor", f"{high} is not above low_freq_factor {low}")
        return RopeConfig("llama3", theta, rope.number("factor"), original, low, high)
    if kind == "yarn":
        factor = rope.number("factor", max_position / original)
        return RopeConfig(
            "yarn", theta, factor, original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.flag("truncate", True),
            attention_factor=_yarn_attention_factor(rope, factor),
        )  # fmt: skip
    raise rope.fail("rope_type", f"{kind!r}, supported: default, linear, llama3, yarn")


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.raw.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.raw.get("mscale") and rope.raw.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


def _eos(fields: Fields, eos: object) -> frozenset[int]:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise fields.fail("eos_token_id", f"{eos!r} is not a token id or a list of them")
    return frozenset(ids)
