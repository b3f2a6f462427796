"""What the leader of several torch ranks does before it computes: it lets the others load, and opens the KV of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvferry.engine.config import ModelConfig
from kvferry.engine.ranks.copies import RemoteCache
from kvferry.engine.ranks.followers import Followers
from kvferry.engine.ranks.part import part_id
from kvferry.engine.ranks.shard import Shard
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.collective import Collective, NetworkGather, open_collective, open_exchange
from kvferry.engine.torch.kv_cache import KVCache
from kvferry.engine.torch.rank import device_of, open_cache
from kvferry.schedule.step import KVFormat


def set_up(
    followers: Followers,
    settings: EngineSettings,
    config: ModelConfig,
    shards: Sequence[Shard],
    num_blocks: int,
    kv_format: KVFormat,
) -> Collective:
    """They load meanwhile. Returns the leader's side of what all exchange through: the network, if a rank is on another
    host."""
    settled = replace(settings, num_blocks=num_blocks).as_fields()
    if not followers.remote:
        followers.set_up("torch", settled)
        return open_collective(followers.memory, 0, followers.size)
    exchange, store = open_exchange(followers.host)
    parts = {rank: part_id(settings, config, kv_format.dtype, shards[rank]) for rank in followers.remote}
    followers.set_up("torch", settled, exchange, kv_format.format_id, parts)
    return NetworkGather(lambda: store, followers.host, 0, followers.size, device_of(settings))


def other_caches(
    followers: Followers,
    settings: EngineSettings,
    config: ModelConfig,
    shards: Sequence[Shard],
    num_blocks: int,
    kv_format: KVFormat,
) -> list[KVCache | RemoteCache]:
    """Of rank 1, 2, …"""
    return [
        RemoteCache(followers, shard.rank, kv_format, shard.kv_heads)
        if shard.rank in followers.remote
        else open_cache(settings, config, shard, num_blocks, followers.memory, own=False)
        for shard in shards[1:]
    ]
