"""Which part of a model each rank of a tensor-parallel worker has. Pure.

Every projection is split by its outputs: query heads with the KV heads that they read, rows of the output and down
projections (columns of the hidden states), rows of gate and up, rows of the vocabulary. So a rank reads whole rows of
the checkpoint, and each output is summed by one rank over the whole input. The usual split of output and down
projections by their inputs would leave partial sums to be added over the ranks, whose order and rounding depend on how
many there are; here the ranks exchange inputs instead, about as many bytes, and the result has the bits of one rank.

KV heads are split where there are enough. Where there are fewer heads than ranks, each rank has one, and those that
share it split its queries. Nothing needs to be divisible: 9 query and 3 KV heads over 2 ranks are 6 + 3 and 2 + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvferry.engine.config import ModelConfig
from kvferry.errors import SettingError

# Columns are cut at multiples of it, where there are enough: kernels work on vectors, and the cuts are no cache lines
# that two ranks write.
UNIT: Final = 16
MAX_RANKS: Final = 64  # KVF_MAX_RANKS


@dataclass(frozen=True, slots=True)
class Shard:
    """What rank `rank` of `size` has: ranges of the whole model's dimensions, none of them empty."""

    rank: int
    size: int
    heads: range  # query heads
    kv_heads: range  # those that `heads` read; one may be in several shards
    hidden: range  # rows of the output and down projections
    intermediate: range  # rows of gate and up
    vocab: range  # rows of embedding and head

    def query_rows(self, head_dim: int) -> range:
        """Rows of the query projection."""
        return range(self.heads.start * head_dim, self.heads.stop * head_dim)

    def key_rows(self, head_dim: int) -> range:
        """Rows of the key projection, and of the value projection."""
        return range(self.kv_heads.start * head_dim, self.kv_heads.stop * head_dim)

    def rows(self, tensor: str, config: ModelConfig) -> range | None:
        """Of a tensor of the checkpoint, weight or bias; None: every rank has all of it."""
        match tensor.split(".")[-2]:
            case "q_proj":
                return self.query_rows(config.head_dim)
            case "k_proj" | "v_proj":
                return self.key_rows(config.head_dim)
            case "o_proj" | "down_proj":
                return self.hidden
            case "gate_proj" | "up_proj":
                return self.intermediate
            case "embed_tokens" | "lm_head":
                return self.vocab
            case _:
                return None


def shards_of(config: ModelConfig, size: int) -> tuple[Shard, ...]:
    """The shards of all ranks. Raises `SettingError` for more ranks than one of the dimensions can be cut into."""
    most = min(config.num_heads, config.hidden_size, config.intermediate_size, config.vocab_size, MAX_RANKS)
    if not 1 <= size <= most:
        problem = f"{size}, this model can be split over 1 to {most} ranks ({config.num_heads} query heads)"
        raise SettingError("tensor_parallel_size", problem)
    return tuple(
        Shard(
            rank, size, *heads_of(config.num_kv_heads, config.queries_per_kv_head, size, rank),
            hidden=cut(config.hidden_size, size, rank),
            intermediate=cut(config.intermediate_size, size, rank),
            vocab=cut(config.vocab_size, size, rank),
        )
        for rank in range(size)
    )  # fmt: skip


def cut(count: int, size: int, rank: int) -> range:
    """A rank's part of `count` equal items: contiguous, as even as whole units allow."""
    unit = UNIT if count // UNIT >= size else 1
    units = -(-count // unit)
    return range(units * rank // size * unit, min(units * (rank + 1) // size * unit, count))


def heads_of(num_kv_heads: int, group: int, size: int, rank: int) -> tuple[range, range]:
    """A rank's query heads and KV heads, of a model with `group` query heads for each KV head."""
    if num_kv_heads >= size:
        kv_heads = _even(num_kv_heads, size, rank)
        return range(kv_heads.start * group, kv_heads.stop * group), kv_heads
    kv_head = next(head for head in range(num_kv_heads) if rank in _even(size, num_kv_heads, head))
    sharing = _even(size, num_kv_heads, kv_head)  # ranks; at most as many as the head has queries
    queries = _even(group, len(sharing), rank - sharing.start)
    first = kv_head * group
    return range(first + queries.start, first + queries.stop), range(kv_head, kv_head + 1)


def _even(count: int, parts: int, part: int) -> range:
    return range(count * part // parts, count * (part + 1) // parts)
