"""Runners of several ranks in one process: a thread for each follower, everything else as between processes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from runners import Runner, native_library

from kvferry.engine.native.follower import NativeFollower
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.ranks.channel import SocketChannel
from kvferry.engine.ranks.followers import Followers, Setup
from kvferry.engine.ranks.following import Follower, follow
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.rank import TorchFollower
from kvferry.engine.torch.runner import TorchRunner


@contextmanager
def ranked(engine: str, settings: EngineSettings, size: int) -> Iterator[Runner]:
    """The leader's runner. `engine` as in `runner_of`. At the end all followers have ended, without an error."""
    memory = SharedMemory.create(size)
    pairs = [tuple(map(SocketChannel, socket.socketpair())) for _ in range(size - 1)]
    failures: list[BaseException] = []

    def run(channel: SocketChannel) -> None:
        try:
            follow(channel, lambda setup: _follower(setup, memory))
        except BaseException as error:
            failures.append(error)
            channel.end()

    threads = [threading.Thread(target=run, args=(theirs,), daemon=True) for _, theirs in pairs]
    for thread in threads:
        thread.start()
    followers = Followers(memory, [own for own, _ in pairs])
    try:
        runner = _leader(engine, replace(settings, tensor_parallel_size=size), followers if size > 1 else None)
        yield runner
        runner.close()
    finally:
        followers.close()
        for thread in threads:
            thread.join(60)
        for own, theirs in pairs:
            own.close()
            theirs.close()
        memory.close()
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads)


def _leader(engine: str, settings: EngineSettings, followers: Followers | None) -> Runner:
    if engine == "torch":
        return TorchRunner(settings, followers=followers)
    isa = engine.removeprefix("native").removeprefix("-") or "auto"
    return NativeRunner(replace(settings, isa=isa), library=native_library(isa), followers=followers)


def _follower(setup: Setup, memory: SharedMemory) -> Follower:
    settings = EngineSettings.of_fields(setup.settings)
    if setup.engine == "torch":
        return TorchFollower(settings, setup.rank, memory)
    return NativeFollower(settings, setup.rank, memory, native_library(settings.isa))
