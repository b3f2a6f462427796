"""The metadata of a llama-architecture GGUF file as Hugging Face's config.json, and the tensors' names.

What kvferry's engine cannot run (experts, scaled RoPE, partial rotation) is refused here, with the key
that says so: a model that loads and then writes nonsense is the worst outcome.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from kvferry.errors import CheckpointError
from kvferry.text.gguf import GgufFile, Scalar, Value

ARCHITECTURE: Final = "llama"
MAX_COUNT: Final = 1 << 31
_REQUIRED: Final = object()

# GGUF -> Hugging Face, after the block's prefix.
_BLOCK_TENSORS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ATTENTION: Final = ("attn_q", "attn_k", "attn_v", "attn_output")


class GgufConfig:
    """Checked sizes of the model, and what follows from them.

    Raises `CheckpointError` for another architecture, a missing or wrong key, or an unsupported feature.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        architecture = self.text("general.architecture")
        if architecture != ARCHITECTURE:
            raise self.error("general.architecture", f"{architecture!r} is not imported, only {ARCHITECTURE!r}")
        self.num_layers: Final = self.count("llama.block_count")
        self.hidden_size: Final = self.count("llama.embedding_length")
        self.intermediate_size: Final = self.count("llama.feed_forward_length")
        self.num_heads: Final = self.count("llama.attention.head_count")
        self.num_kv_heads: Final = self.count("llama.attention.head_count_kv", self.num_heads)
        self.max_context: Final = self.count("llama.context_length")
        self.head_dim: Final = self.count("llama.attention.key_length", self.hidden_size // self.num_heads)
        self.rms_norm_eps: Final = self.real("llama.attention.layer_norm_rms_epsilon")
        self.rope_theta: Final = self.real("llama.rope.freq_base", 10_000.0)
        self.tied: Final = "output.weight" not in file.tensors
        self.attention_bias: Final = "blk.0.attn_q.bias" in file.tensors
        self._refuse_unsupported()
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None:
            raise self.error("token_embd.weight", "missing")
        self.vocab_size: Final = embedding.shape[0]

    def _refuse_unsupported(self) -> None:
        if self.count("llama.expert_count", 0):
            raise self.error("llama.expert_count", "mixtures of experts are not supported")
        if (kind := self._entry("llama.rope.scaling.type", "none")) != "none":
            raise self.error("llama.rope.scaling.type", f"{kind!r} is not imported; use the Hugging Face directory")
        if "rope_freqs.weight" in self._file.tensors:
            raise self.error("rope_freqs.weight", "scaled RoPE is not imported; use the Hugging Face directory")
        if self.count("llama.rope.dimension_count", self.head_dim) != self.head_dim:
            raise self.error("llama.rope.dimension_count", "partial rotation is not supported")
        if self.count("llama.attention.value_length", self.head_dim) != self.head_dim:
            raise self.error("llama.attention.value_length", "differs from key_length")
        if self.head_dim % 2 or self.num_heads % self.num_kv_heads:
            raise self.error("llama.attention.head_count_kv", "head sizes and counts do not divide")

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(str(self._file.path), f"{key}: {problem}")

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Hugging Face name -> (GGUF name, shape), in the order of the model."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        names: dict[str, tuple[str, tuple[int, ...]]] = {
            "model.embed_tokens.weight": ("token_embd.weight", (self.vocab_size, hidden))
        }
        for layer in range(self.num_layers):
            for source, target in _BLOCK_TENSORS.items():
                target = f"model.layers.{layer}.{target}"
                names[f"{target}.weight"] = (f"blk.{layer}.{source}.weight", shapes[source])
                if self.attention_bias and source in _ATTENTION:
                    names[f"{target}.bias"] = (f"blk.{layer}.{source}.bias", shapes[source][:1])
        names["model.norm.weight"] = ("output_norm.weight", (hidden,))
        if not self.tied:
            names["lm_head.weight"] = ("output.weight", (self.vocab_size, hidden))
        return names

    def hugging_face(self) -> dict[str, Any]:
        """The content of config.json, without the special token ids."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_context,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "attention_bias": self.attention_bias,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }

    def _entry(self, key: str, default: object = _REQUIRED) -> Value:
        value = self._file.entries.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(key, "missing")
        return default  # type: ignore[return-value]  # the caller's own default, of the type that it checks for

    def count(self, key: str, default: object = _REQUIRED) -> int:
        value = self._entry(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            raise self.error(key, f"not a count: {value!r}")
        if value == 0 and default is _REQUIRED:
            raise self.error(key, "is zero")
        return value

    def real(self, key: str, default: object = _REQUIRED) -> float:
        value = self._entry(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(key, f"not a positive number: {value!r}")
        return float(str(np.float32(value)))  # the shortest decimal of the stored float32: 1e-05, as published

    def text(self, key: str, default: object = _REQUIRED) -> str:
        value = self._entry(key, default)
        if not isinstance(value, str):
            raise self.error(key, "not a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._entry(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"neither true nor false: {value!r}")
        return value

    def token_id(self, key: str) -> int | None:
        """A special token's id; None if the file has no such token."""
        if key not in self._file.entries:
            return None
        token_id = self.count(key, 0)
        if token_id >= self.vocab_size:
            raise self.error(key, f"{token_id} is not below the vocabulary's size {self.vocab_size}")
        return token_id

    def items(self, key: str, kind: type[Scalar]) -> list[Any]:
        """An array of `kind`."""
        value = self._entry(key)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.error(key, f"not an array of {kind.__name__}")
        return value
