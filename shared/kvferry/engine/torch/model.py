"""The transformer: a flat batch of rows in, hidden states out. KV is read and written through block slots.

Rounding points are those of Hugging Face transformers run eagerly in the same dtype: the norm is computed in
fp32, rounded, then scaled; both halves of the rotation, the activation, every projection and every residual
sum are rounded to the model's dtype.

Of several ranks each computes columns of its own (`ranks/shard.py`) of what attention returns, of the hidden states, of
what the MLP multiplies and of the logits; after each of these they exchange them (`collective.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvferry.engine.config import ModelConfig
from kvferry.engine.ranks.shard import Shard
from kvferry.engine.torch.attention import Attention
from kvferry.engine.torch.batch import Batch
from kvferry.engine.torch.collective import Collective
from kvferry.engine.torch.kv_cache import KVCache
from kvferry.engine.torch.linear import Linear
from kvferry.engine.torch.rotation import Rotation


@dataclass(frozen=True, slots=True)
class Layer:
    """A rank's weights of one layer. Norm weights are in the model's dtype."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Linear  # hidden -> (num_heads + 2 * num_kv_heads) * head_dim
    qk_norm: torch.Tensor | None  # [num_heads + num_kv_heads, head_dim]: one row per head
    output: Linear  # num_heads * head_dim -> hidden
    post_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 * intermediate, gate first
    down: Linear  # intermediate -> hidden


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: torch.Tensor  # [own vocab, hidden]
    layers: tuple[Layer, ...]
    norm: torch.Tensor  # [hidden]
    head: Linear  # hidden -> own vocab

    @property
    def num_bytes(self) -> int:
        """Memory; of a tied model's head, which is packed beside the embedding, too."""
        linears = [self.head]
        plain = [self.embedding, self.norm]
        for layer in self.layers:
            linears += [layer.qkv, layer.output, layer.gate_up, layer.down]
            plain += [layer.input_norm, layer.post_norm]
        return sum(tensor.nbytes for tensor in plain) + sum(linear.num_bytes for linear in linears)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension: in fp32, rounded to x's dtype, then times the weight."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(wide, scale).to(x.dtype).mul_(weight)


class Model:
    def __init__(
        self,
        config: ModelConfig,
        shards: Sequence[Shard],
        rank: int,
        weights: Weights,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        collective: Collective,
    ) -> None:
        """`weights` are those of `shards[rank]`."""
        self.config = config
        self._shard = shard = shards[rank]
        self._weights = weights
        self._rope = Rotation(config.rope, config.head_dim, max_len, dtype, device)
        self._attention = Attention(len(shard.heads), len(shard.kv_heads), config.head_dim, dtype, device)
        self._gather = collective.gather
        # Columns of each rank.
        self._mixed = [len(each.heads) * config.head_dim for each in shards]
        self._hidden = [len(each.hidden) for each in shards]
        self._activated = [len(each.intermediate) for each in shards]
        self._vocab = [len(each.vocab) for each in shards]
        self._vocab_ends = torch.tensor([each.vocab.stop for each in shards], device=device)

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states [num_rows, hidden] before the final norm; writes the rows' KV."""
        config = self.config
        eps, num_queries, num_keys = config.rms_norm_eps, len(self._shard.heads), len(self._shard.kv_heads)
        num_rotated = num_queries + num_keys
        num_rows = len(batch.tokens)
        cos, sin = self._rope.at(batch.positions)
        hidden = self._embed(batch.tokens)
        for index, layer in enumerate(self._weights.layers):
            heads = layer.qkv(rms_norm(hidden, layer.input_norm, eps))
            heads = heads.view(num_rows, num_rotated + num_keys, config.head_dim)
            rotated = heads[:, :num_rotated]
            if layer.qk_norm is not None:
                rotated = rms_norm(rotated, layer.qk_norm, eps)
            rotated = self._rope.rotate(rotated, cos, sin)
            cache.write(index, batch.slots, rotated[:, num_queries:], heads[:, num_rotated:])
            mixed = self._gather(self._attend(batch, cache, index, rotated[:, :num_queries]), self._mixed)
            hidden = self._gather(layer.output(mixed), self._hidden).add_(hidden)
            gate, up = layer.gate_up(rms_norm(hidden, layer.post_norm, eps)).chunk(2, -1)
            activated = self._gather(functional.silu(gate).mul_(up), self._activated)
            hidden = self._gather(layer.down(activated), self._hidden).add_(hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden] -> [num_rows, vocab], in the model's dtype."""
        normed = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        return self._gather(self._weights.head(normed), self._vocab)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[num_rows] -> [num_rows, hidden]: each row from the rank that has it."""
        embedding, vocab, size = self._weights.embedding, self._shard.vocab, self._shard.size
        if size == 1:
            return embedding.index_select(0, tokens)
        own = (tokens >= vocab.start) & (tokens < vocab.stop)
        rows = embedding.new_zeros(len(tokens), self.config.hidden_size)
        rows[own] = embedding.index_select(0, tokens[own] - vocab.start)
        all_rows = self._gather(rows, [self.config.hidden_size] * size).view(len(tokens), size, -1)
        owner = torch.searchsorted(self._vocab_ends, tokens, right=True)
        return all_rows[torch.arange(len(tokens), device=tokens.device), owner]

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
