"""A checkpoint, streamed into the library tensor by tensor: the peak is the packed weights and one piece.

What the library takes is bf16. fp32 and fp16 checkpoints are rounded on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvferry.engine.bf16 import Bits, to_bf16
from kvferry.engine.checkpoint import Checkpoint, expected_shapes
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import Weight

PIECE_ELEMENTS: Final = 1 << 20  # handed over at once: bounds what a conversion takes

Take = Callable[[Weight, int, Bits, int], None]  # weight, layer, rows [n, k], first row


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a checkpoint and where it goes."""

    tensor: str
    weight: Weight
    layer: int = 0
    first_row: int = 0


def parts(config: ModelConfig) -> Iterator[Part]:
    """Every tensor of a checkpoint, in the order of `expected_shapes`."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield Part("model.embed_tokens.weight", Weight.EMBEDDING)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        yield Part(f"{prefix}.input_layernorm.weight", Weight.INPUT_NORM, layer)
        for name, first_row in (("q_proj", 0), ("k_proj", queries), ("v_proj", queries + keys)):
            yield Part(f"{attention}.{name}.weight", Weight.QKV, layer, first_row)
            if config.qkv_bias:
                yield Part(f"{attention}.{name}.bias", Weight.QKV_BIAS, layer, first_row)
        if config.qk_norm:
            yield Part(f"{attention}.q_norm.weight", Weight.Q_NORM, layer)
            yield Part(f"{attention}.k_norm.weight", Weight.K_NORM, layer)
        yield Part(f"{attention}.o_proj.weight", Weight.OUTPUT, layer)
        if config.output_bias:
            yield Part(f"{attention}.o_proj.bias", Weight.OUTPUT_BIAS, layer)
        yield Part(f"{prefix}.post_attention_layernorm.weight", Weight.POST_NORM, layer)
        for name, weight, bias in (
            ("gate_proj", Weight.GATE, Weight.GATE_BIAS),
            ("up_proj", Weight.UP, Weight.UP_BIAS),
            ("down_proj", Weight.DOWN, Weight.DOWN_BIAS),
        ):
            yield Part(f"{mlp}.{name}.weight", weight, layer)
            if config.mlp_bias:
                yield Part(f"{mlp}.{name}.bias", bias, layer)
    yield Part("model.norm.weight", Weight.NORM)
    if not config.tie_word_embeddings:
        yield Part("lm_head.weight", Weight.HEAD)


def stream(checkpoint: Checkpoint, config: ModelConfig, take: Take, progress: Callable[[float], None]) -> None:
    """Hand every tensor over, in pieces of rows. `progress` gets the share of the elements that are done."""
    todo = list(parts(config))
    shapes = expected_shapes(config)
    total = sum(prod(shapes[part.tensor]) for part in todo)
    done = 0
    for part in todo:
        for start, rows in checkpoint.pieces(part.tensor, PIECE_ELEMENTS):  # a norm or bias is [n, 1]
            take(part.weight, part.layer, _bits(rows), part.first_row + start)
            done += rows.size
        progress(done / total)


def _bits(rows: npt.NDArray[Any]) -> Bits:
    """bf16 bits of rows as a checkpoint holds them."""
    if rows.dtype == np.uint16:
        return rows
    return to_bf16(rows.astype(np.float32, copy=False))
