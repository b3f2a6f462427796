"""One rank of a tensor-parallel worker: `python -m kvferry.worker.rank LEVEL FORMAT NAME CHANNEL MEMORY…`; the last
ones are descriptors.

Its leader starts it (`ranks.py`), tells it what to load and what to compute, and ends it by closing the channel.
"""

from __future__ import annotations

import signal
import socket
import sys

from kvferry.engine.ranks.channel import SocketChannel
from kvferry.engine.ranks.followers import Setup
from kvferry.engine.ranks.following import Follower, follow
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.settings import EngineSettings
from kvferry.errors import CheckpointError, SettingError
from kvferry.log import get_logger, setup_logging

log = get_logger(__name__)


def main() -> None:
    level, log_format, name, channel_number, *memory_numbers = sys.argv[1:]
    setup_logging(level, log_format, service=name)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the leader drains and ends this one then
        signal.signal(number, signal.SIG_IGN)
    memory = SharedMemory([int(number) for number in memory_numbers])
    channel = SocketChannel(socket.socket(fileno=int(channel_number)))
    try:
        follow(channel, lambda setup: load_follower(setup, memory))
    except (SettingError, CheckpointError):
        sys.exit(1)  # its leader says why
    except Exception:
        log.exception("rank failed")
        sys.exit(1)
    finally:
        channel.close()


def load_follower(setup: Setup, memory: SharedMemory) -> Follower:
    """Raises what the leader's runner does."""
    settings = EngineSettings.of_fields(setup.settings)
    if setup.engine == "native":
        from kvferry.engine.native.follower import NativeFollower

        return NativeFollower(settings, setup.rank, memory)
    from kvferry.engine.torch.collective import joined_exchange
    from kvferry.engine.torch.rank import TorchFollower

    collective = None
    if setup.exchange is not None:  # others are on other hosts; this one is on the leader's
        size = settings.tensor_parallel_size
        collective = joined_exchange(setup.exchange, setup.exchange.host, setup.rank, size)
    return TorchFollower(settings, setup.rank, memory, collective)


if __name__ == "__main__":
    main()
