"""Who pulls what from whom: a pull is cut by the KV heads that the shards of its two workers have. Pure.

A shard of D needs all of its heads, also those that another shard has, too. It takes each from one shard of P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.wire.record import WorkerAddress


@dataclass(frozen=True, slots=True)
class Part:
    """KV heads of a pull, none of them missing in either shard."""

    own: int  # D's shard
    peer: int  # P's shard
    heads: range


def heads_of_shards(address: WorkerAddress, all_heads: range) -> tuple[range, ...] | None:
    """What each shard has. None if the address is not one of a worker with these heads."""
    if not address.heads:
        return (all_heads,) if len(address.shards) == 1 else None
    heads = tuple(range(first, end) for first, end in address.heads)
    inside = all(0 <= part.start < part.stop <= all_heads.stop for part in heads)
    return heads if inside and len(heads) == len(address.shards) else None


def parts_of(own: Sequence[range], peer: Sequence[range]) -> tuple[Part, ...] | None:
    """The parts of a pull between workers with these shards, the one between both leaders first. None if the peer's
    shards lack a head, or its leader has nothing for ours."""
    parts: list[Part] = []
    for shard, wanted in enumerate(own):
        first = wanted.start
        while first < wanted.stop:
            having = next((index for index, heads in enumerate(peer) if first in heads), None)
            if having is None:
                return None
            end = min(wanted.stop, peer[having].stop)
            parts.append(Part(shard, having, range(first, end)))
            first = end
    return tuple(parts) if (parts[0].own, parts[0].peer) == (0, 0) else None
