"""The transformer: a flat batch of rows in, hidden states out. KV is read and written through block slots.

Rounding points are those of Hugging Face transformers run eagerly in the same dtype: the norm is computed in
fp32, rounded, then scaled; both halves of the rotation, the activation, every projection and every residual
sum are rounded to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kvferry.engine.attention import Attention
from kvferry.engine.batch import Batch
from kvferry.engine.config import ModelConfig
from kvferry.engine.kv_cache import KVCache
from kvferry.engine.linear import Linear
from kvferry.engine.rotation import Rotation


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer. Norm weights are in the model's dtype."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # hidden -> (num_heads + 2 * num_kv_heads) * head_dim
    qk_norm: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]: one row per head
    output: Linear  # num_heads * head_dim -> hidden
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 * intermediate, gate first
    down: Linear  # intermediate -> hidden


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: torch.Tensor  # [hidden]
    head: Linear  # hidden -> vocab


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension: in fp32, rounded to x's dtype, then times the weight."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(wide, scale).to(x.dtype).mul_(weight)


class Model:
    def __init__(
        self, config: ModelConfig, weights: Weights, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self._weights = weights
        self._rope = Rotation(config.rope, config.head_dim, max_len, dtype, device)
        self._attention = Attention(config.num_heads, config.num_kv_heads, config.head_dim, dtype, device)

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states [num_rows, hidden] before the final norm; writes the rows' KV."""
        config = self.config
        eps, num_queries = config.rms_norm_eps, config.num_heads
        num_rotated = num_queries + config.num_kv_heads
        num_rows = len(batch.tokens)
        cos, sin = self._rope.at(batch.positions)
        hidden = self._weights.embedding.index_select(0, batch.tokens)
        for index, layer in enumerate(self._weights.layers):
            heads = layer.qkv(rms_norm(hidden, layer.input_norm, eps))
            heads = heads.view(num_rows, num_rotated + config.num_kv_heads, config.head_dim)
            rotated = heads[:, :num_rotated]
            if layer.qk_norm is not None:
                rotated = rms_norm(rotated, layer.qk_norm, eps)
            rotated = self._rope.rotate(rotated, cos, sin)
            cache.write(index, batch.slots, rotated[:, num_queries:], heads[:, num_rotated:])
            mixed = self._attend(batch, cache, index, rotated[:, :num_queries])
            hidden = layer.output(mixed).add_(hidden)
            gate, up = layer.gate_up(rms_norm(hidden, layer.post_norm, eps)).chunk(2, -1)
            hidden = layer.down(functional.silu(gate).mul_(up)).add_(hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden] -> [num_rows, vocab], in the model's dtype."""
        return self._weights.head(rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps))

    def _attend(self, batch: Batch, cache: KVCache, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """`queries` [num_rows, num_heads, head_dim] -> [num_rows, num_heads * head_dim]."""
        plan = batch.attention[self.config.windows[layer]]
        parts = []
        for group in plan.groups:
            keys, values = cache.read(layer, group.slots)
            parts.append(self._attention.decode(queries[group.start : group.end], keys, values, group))
        for chunk in plan.chunks:
            keys, values = cache.read(layer, chunk.slots)
            rows = queries[chunk.start : chunk.end]
            parts.append(self._attention.prefill(rows, keys, values, chunk, plan.window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
