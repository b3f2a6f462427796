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
from kvferry.engine.ranks.shard import Shard

PIECE_ELEMENTS: Final = 1 << 20  # handed over at once: bounds what a conversion takes

Take = Callable[[Weight, int, Bits, int], None]  # weight, layer, rows [n, k], first row


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor of a checkpoint and where they go."""

    tensor: str
    rows: range
    weight: Weight
    layer: int = 0
    first_row: int = 0


def parts(config: ModelConfig, shard: Shard) -> Iterator[Part]:
    """What a shard has of every tensor of a checkpoint, in the order of `expected_shapes`."""
    shapes = expected_shapes(config)

    def part(tensor: str, weight: Weight, layer: int = 0, first_row: int = 0) -> Part:
        rows = shard.rows(tensor, config)
        return Part(tensor, range(shapes[tensor][0]) if rows is None else rows, weight, layer, first_row)

    yield part("model.embed_tokens.weight", Weight.EMBEDDING)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        yield part(f"{prefix}.input_layernorm.weight", Weight.INPUT_NORM, layer)
        first_row = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = part(f"{attention}.{name}.weight", Weight.QKV, layer, first_row)
            yield projection
            if config.qkv_bias:
                yield part(f"{attention}.{name}.bias", Weight.QKV_BIAS, layer, first_row)
            first_row += len(projection.rows)
        if config.qk_norm:
            yield part(f"{attention}.q_norm.weight", Weight.Q_NORM, layer)
            yield part(f"{attention}.k_norm.weight", Weight.K_NORM, layer)
        yield part(f"{attention}.o_proj.weight", Weight.OUTPUT, layer)
        if config.output_bias:
            yield part(f"{attention}.o_proj.bias", Weight.OUTPUT_BIAS, layer)
        yield part(f"{prefix}.post_attention_layernorm.weight", Weight.POST_NORM, layer)
        for name, weight, bias in (
            ("gate_proj", Weight.GATE, Weight.GATE_BIAS),
            ("up_proj", Weight.UP, Weight.UP_BIAS),
            ("down_proj", Weight.DOWN, Weight.DOWN_BIAS),
        ):
            yield part(f"{mlp}.{name}.weight", weight, layer)
            if config.mlp_bias:
                yield part(f"{mlp}.{name}.bias", bias, layer)
    yield part("model.norm.weight", Weight.NORM)
    if not config.tie_word_embeddings:
        yield part("lm_head.weight", Weight.HEAD)


def stream(
    checkpoint: Checkpoint, config: ModelConfig, shard: Shard, take: Take, progress: Callable[[float], None]
) -> None:
    """Hand a shard's part of every tensor over, in pieces of rows; nothing else is read. `progress` gets the share of
    the elements that are done."""
    todo = list(parts(config, shard))
    shapes = expected_shapes(config)
    total = sum(len(part.rows) * prod(shapes[part.tensor][1:]) for part in todo)
    done = 0
    for part in todo:
        for start, rows in checkpoint.pieces(part.tensor, part.rows, PIECE_ELEMENTS):  # a norm or bias is [n, 1]
            take(part.weight, part.layer, _bits(rows), part.first_row + start - part.rows.start)
            done += rows.size
        progress(done / total)


def _bits(rows: npt.NDArray[Any]) -> Bits:
    """bf16 bits of rows as a checkpoint holds them."""
    if rows.dtype == np.uint16:
        return rows
    return to_bf16(rows.astype(np.float32, copy=False))
