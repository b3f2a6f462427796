"""The in-memory model on several ranks, all in one thread."""

from __future__ import annotations

from collections.abc import Callable

from kvferry.engine.memory.runner import MemoryRunner, MemorySettings, memory_follower
from kvferry.engine.ranks.channel import Channel
from kvferry.engine.ranks.followers import Followers
from kvferry.engine.ranks.following import DirectChannel, Load
from kvferry.engine.ranks.shared_memory import SharedMemory


def ranked_memory(
    settings: MemorySettings, size: int, channel: Callable[[int, Load], Channel] | None = None, num_remote: int = 0
) -> MemoryRunner:
    """The leader of `size` ranks, of which the last `num_remote` hand their KV over by themselves. `channel`: to one of
    the others, by its number; a `DirectChannel` unless given."""
    if size == 1:
        return MemoryRunner(settings)
    memory = SharedMemory.create(size)
    connect = channel or (lambda _, load: DirectChannel(load))
    channels = [
        connect(rank, lambda setup: memory_follower(settings, size, setup.rank, memory)) for rank in range(1, size)
    ]
    runner = MemoryRunner(settings, Followers(memory, channels), num_remote)
    memory.close()  # what is mapped stays
    return runner
