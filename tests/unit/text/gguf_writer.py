"""Writes GGUF files for the tests, well-formed and not, and a tiny llama model in that form."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .tiny_models import SPECIAL, byte_level_tokenizer

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_LAYOUTS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
TYPE_F32, TYPE_Q8_0 = 0, 8


@dataclass
class Tensor:
    """One tensor as stored. `shape` is row-major."""

    name: str
    shape: tuple[int, ...]
    kind: int
    stored: bytes
    offset: int | None = None  # another than where it lies


@dataclass
class Entry:
    kind: int
    value: Any
    item_kind: int = STRING


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    return string(value) if kind == STRING else struct.pack(_LAYOUTS[kind], value)


def gguf(entries: dict[str, Entry], tensors: Sequence[Tensor] = (), version: int = 3, alignment: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    for key, entry in entries.items():
        head += string(key) + struct.pack("<I", entry.kind)
        if entry.kind == ARRAY:
            head += struct.pack("<IQ", entry.item_kind, len(entry.value))
            head += b"".join(_value(entry.item_kind, item) for item in entry.value)
        else:
            head += _value(entry.kind, entry.value)
    body = b""
    for tensor in tensors:
        body += b"\0" * (-len(body) % alignment)
        dims = struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        offset = len(body) if tensor.offset is None else tensor.offset
        head += string(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims
        head += struct.pack("<IQ", tensor.kind, offset)
        body += tensor.stored
    return head + b"\0" * (-len(head) % alignment) + body


@dataclass
class TinyLlama:
    """Weights by Hugging Face name, f32, and what a GGUF file of them consists of."""

    weights: dict[str, npt.NDArray[np.float32]]
    entries: dict[str, Entry]
    tensors: dict[str, Tensor]

    def write(self, path: Path) -> Path:
        path.write_bytes(gguf(self.entries, list(self.tensors.values())))
        return path


HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 64, 4, 2, 16, 96, 2


def tiny_llama(seed: int = 0, tied: bool = True) -> TinyLlama:
    """As llama.cpp's converter writes it: the rows of Q and K interleaved head by head."""
    import json

    tokenizer = json.loads(byte_level_tokenizer().to_str())["model"]
    vocab = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    rng = np.random.default_rng(seed)
    weights: dict[str, npt.NDArray[np.float32]] = {}
    tensors: dict[str, Tensor] = {}

    def add(source: str, target: str, shape: tuple[int, ...], heads: int = 0) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        weights[f"{target}.weight"] = values
        if heads:
            values = values.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)
        name = f"{source}.weight"
        tensors[name] = Tensor(name, shape, TYPE_F32, values.tobytes())

    add("token_embd", "model.embed_tokens", (len(vocab), HIDDEN))
    for layer in range(LAYERS):
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{source}.attn_norm", f"{target}.input_layernorm", (HIDDEN,))
        add(f"{source}.attn_q", f"{target}.self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN), HEADS)
        add(f"{source}.attn_k", f"{target}.self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN), KV_HEADS)
        add(f"{source}.attn_v", f"{target}.self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN))
        add(f"{source}.attn_output", f"{target}.self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM))
        add(f"{source}.ffn_norm", f"{target}.post_attention_layernorm", (HIDDEN,))
        add(f"{source}.ffn_gate", f"{target}.mlp.gate_proj", (INNER, HIDDEN))
        add(f"{source}.ffn_up", f"{target}.mlp.up_proj", (INNER, HIDDEN))
        add(f"{source}.ffn_down", f"{target}.mlp.down_proj", (HIDDEN, INNER))
    add("output_norm", "model.norm", (HIDDEN,))
    if not tied:
        add("output", "lm_head", (len(vocab), HIDDEN))
    entries = {
        "general.architecture": Entry(STRING, "llama"),
        "llama.block_count": Entry(U32, LAYERS),
        "llama.context_length": Entry(U32, 128),
        "llama.embedding_length": Entry(U32, HIDDEN),
        "llama.feed_forward_length": Entry(U32, INNER),
        "llama.attention.head_count": Entry(U32, HEADS),
        "llama.attention.head_count_kv": Entry(U32, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": Entry(F32, 1e-5),
        "llama.rope.freq_base": Entry(F32, 10000.0),
        "llama.rope.dimension_count": Entry(U32, HEAD_DIM),
        "tokenizer.ggml.model": Entry(STRING, "gpt2"),
        "tokenizer.ggml.pre": Entry(STRING, "gpt-2"),
        "tokenizer.ggml.tokens": Entry(ARRAY, vocab),
        "tokenizer.ggml.token_type": Entry(ARRAY, [3 if token in SPECIAL else 1 for token in vocab], I32),
        "tokenizer.ggml.merges": Entry(ARRAY, [" ".join(merge) for merge in tokenizer["merges"]]),
        "tokenizer.ggml.bos_token_id": Entry(U32, 0),
        "tokenizer.ggml.eos_token_id": Entry(U32, 1),
        "tokenizer.chat_template": Entry(STRING, "{{ messages[0].content }}"),
    }
    return TinyLlama(weights, entries, tensors)
