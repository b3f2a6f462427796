"""The processes of a tensor-parallel worker's ranks. This one is rank 0, the leader: it starts the others and ends with
them.

A rank is tied to this process, so that none is left behind, and ignores signals that are sent to a whole group: it ends
when its channel does. One that dies otherwise takes this process with it at once, because the step that waits for it
never ends; the supervisor starts the worker again, and gateways place its requests anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from kvferry import ready
from kvferry.bus.tether import tethered
from kvferry.engine.ranks import Followers, SharedMemory
from kvferry.errors import SettingError
from kvferry.log import get_logger
from kvferry.worker.settings import WorkerSettings

log = get_logger(__name__)
EXIT_RANK_LOST: Final = 71
END_TIMEOUT_S: Final = 10.0  # for a rank to free its memory


class RankProcesses:
    """Ranks 1, 2, … of this worker, if it has them. Leave it with `close`."""

    def __init__(
        self, followers: Followers | None, processes: list[subprocess.Popen[bytes]], channels: list[socket.socket]
    ) -> None:
        self.followers = followers
        self._processes = processes
        self._channels = channels
        self._watching: asyncio.AbstractEventLoop | None = None

    @classmethod
    def start(cls, settings: WorkerSettings) -> RankProcesses:
        """They wait to be set up. To be called by a thread that lasts as long as they should. Raises `SettingError`."""
        size = settings.tensor_parallel_size
        if size == 1:
            return cls(None, [], [])
        if sys.platform != "linux":
            raise SettingError("--tensor-parallel-size", f"{size}, more than one rank needs Linux")
        memory = SharedMemory.create(size)
        environ = {field: value for field, value in os.environ.items() if field != ready.READY_FD}
        processes, channels = [], []
        for rank in range(1, size):
            own, theirs = socket.socketpair()
            with theirs:
                descriptors = (theirs.fileno(), *memory.descriptors)
                own_log = (settings.log_level, settings.log_format, f"{settings.name}-rank-{rank}")
                arguments = ("-P", "-m", "kvferry.worker.rank", *own_log, *map(str, descriptors))
                command = tethered(sys.executable, *arguments)
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environ, pass_fds=descriptors))
            channels.append(own)
        return cls(Followers(memory, channels), processes, channels)

    def watch(self) -> None:
        """End this process as soon as a rank ends, or the channels were closed for a step that failed. To be called on
        the event loop when all ranks are ready."""
        self._watching = asyncio.get_running_loop()
        for rank, channel in enumerate(self._channels, 1):
            self._watching.add_reader(channel, self._lost, rank)

    def close(self) -> None:
        """End the ranks. Blocks until they have ended."""
        if self._watching is not None:
            for channel in self._channels:
                self._watching.remove_reader(channel)
        if self.followers is None:
            return
        self.followers.close()
        for process in self._processes:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for channel in self._channels:
            channel.close()
        self.followers.memory.close()

    def _lost(self, rank: int) -> None:
        process = self._processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)  # its channel closes a moment before it is gone
        code = process.returncode
        log.error("a rank has ended: exiting", rank=rank, code=code)
        if code is not None and -code == signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)  # killed from outside, as the supervisor should see it
        os._exit(EXIT_RANK_LOST)  # the engine thread may never return: nothing can be waited for


@contextlib.contextmanager
def ranks_of(settings: WorkerSettings) -> Iterator[RankProcesses]:
    """The other ranks of a worker, if it has any, until the end of the block."""
    ranks = RankProcesses.start(settings)
    try:
        yield ranks
    finally:
        ranks.close()
