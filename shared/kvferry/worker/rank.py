"""One rank of a tensor-parallel worker: `python -m kvferry.worker.rank LEVEL FORMAT NAME CHANNEL MEMORY…`; the last
ones are descriptors.

Its leader starts it (`ranks.py`), tells it what to load and what to compute, and ends it by closing the channel.
"""

from __future__ import annotations

import signal
import socket
import sys

import msgspec

from kvferry.engine.ranks import Failed, Follower, Setup, SharedMemory, await_setup, follow, send
from kvferry.engine.settings import EngineSettings
from kvferry.log import get_logger, setup_logging

log = get_logger(__name__)


def main() -> None:
    level, log_format, name, channel_number, *memory_numbers = sys.argv[1:]
    setup_logging(level, log_format, service=name)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the leader drains and ends this one then
        signal.signal(number, signal.SIG_IGN)
    memory = SharedMemory([int(number) for number in memory_numbers])
    with socket.socket(fileno=int(channel_number)) as channel:
        setup = await_setup(channel)
        if setup is None:
            return
        try:
            follower = load_follower(setup, memory)
        except Exception as error:
            send(channel, msgspec.msgpack.encode(Failed.of(error)))
            sys.exit(1)
        try:
            follow(channel, follower)
        except Exception:
            log.exception("rank failed", rank=setup.rank)
            sys.exit(1)
        follower.close()


def load_follower(setup: Setup, memory: SharedMemory) -> Follower:
    """Raises what the leader's runner does."""
    settings = EngineSettings.of_fields(setup.settings)
    if setup.engine == "native":
        from kvferry.engine.native.follower import NativeFollower

        return NativeFollower(settings, setup.rank, memory)
    from kvferry.engine.torch_rank import TorchFollower

    return TorchFollower(settings, setup.rank, memory)


if __name__ == "__main__":
    main()
