"""Attention over the paged cache: batched for decoding sequences, tiled for prefill chunks.

Both are a scaled product, a softmax and a product, rounded where Hugging Face's eager attention rounds:
scores to the model's dtype, softmax in fp32, probabilities to the model's dtype. The scale is applied before
the scores are rounded, which is bit-equal where it is a power of two and one rounding less where it isn't.
On a CPU in bf16 the batched products of oneDNN are faster than the fused kernel of
`scaled_dot_product_attention`, which also can't skip the keys above the diagonal of a tile.

Query heads that share a KV head are extra rows of the same product, so keys are never repeated.
"""

from __future__ import annotations

from typing import Final

import torch

from kvferry.engine.torch.batch import Chunk, DecodeGroup

# Query positions of a tile. Scores of a tile should stay in the L2 cache; smaller tiles lose in the product.
TILE: Final = 64


class Attention:
    """Shapes and constants of one model's attention."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_kv_heads = num_kv_heads
        self._queries = num_heads // num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5
        self._none = torch.zeros(1, 1, 1, dtype=dtype, device=device)  # baddbmm wants an addend, beta=0
        forbidden = torch.full((TILE, TILE), float("-inf"), dtype=dtype, device=device)
        self._above = forbidden.triu(1)  # keys after the row's own position
        self._below = forbidden.tril(-1)  # keys before the row's window
        self._above[~torch.isinf(self._above)] = 0
        self._below[~torch.isinf(self._below)] = 0

    def decode(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup
    ) -> torch.Tensor:
        """One row per sequence.

        `queries` [num_sequences, num_heads, head_dim]; `keys`, `values` [num_kv_heads, num_sequences *
        num_keys, head_dim] -> [num_sequences, num_heads * head_dim].
        """
        count, heads, dim = len(queries), self._num_kv_heads, self._head_dim
        rows = queries.view(count, heads, self._queries, dim).transpose(0, 1)
        rows = rows.reshape(heads * count, self._queries, dim)
        keys = keys.view(heads * count, group.num_keys, dim)
        values = values.view(heads * count, group.num_keys, dim)
        if group.mask is None:
            scores = torch.baddbmm(self._none, rows, keys.transpose(1, 2), beta=0, alpha=self._scale)
        else:
            scores = torch.baddbmm(group.mask, rows, keys.transpose(1, 2), alpha=self._scale)
        mixed = torch.bmm(torch.softmax(scores, -1), values)
        return mixed.view(heads, count, self._queries * dim).transpose(0, 1).reshape(count, -1)

    def prefill(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunk: Chunk,
        window: int | None,
    ) -> torch.Tensor:
        """The rows of one chunk, causal.

        `queries` [num_rows, num_heads, head_dim]; `keys`, `values` [num_kv_heads, num_keys, head_dim] ->
        [num_rows, num_heads * head_dim].
        """
        count, heads, dim = len(queries), self._num_kv_heads, self._head_dim
        per_head = queries.view(count, heads, self._queries, dim).permute(1, 2, 0, 3)
        transposed = keys.transpose(1, 2)
        mixed = torch.empty(count, heads, self._queries, dim, dtype=queries.dtype, device=queries.device)
        for start in range(0, count, TILE):
            end = min(start + TILE, count)
            size = end - start
            own = chunk.position - chunk.first_key + start  # key index of the tile's first row
            oldest = 0 if window is None else own - window + 1  # first key in that row's window
            low, high = max(oldest, 0), own + size
            rows = per_head[:, :, start:end].reshape(heads, self._queries * size, dim)
            scores = torch.baddbmm(self._none, rows, transposed[:, :, low:high], beta=0, alpha=self._scale).view(
                heads, self._queries, size, high - low
            )
            scores[..., own - low :].add_(self._above[:size, :size])
            if window is not None and (cut := size - (low - oldest)) > 0:
                # Row r may not see the r oldest keys of the tile; some of those may lie before the cache.
                cut = min(cut, high - low)
                scores[..., :cut].add_(self._below[:size, low - oldest : low - oldest + cut])
            weights = torch.softmax(scores, -1).view(heads, self._queries * size, high - low)
            tile = torch.bmm(weights, values[:, low:high]).view(heads, self._queries, size, dim)
            mixed[start:end] = tile.permute(2, 0, 1, 3)
        return mixed.view(count, -1)
