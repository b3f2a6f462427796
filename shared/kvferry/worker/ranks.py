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
from kvferry.engine.config import ModelConfig
from kvferry.engine.ranks.channel import SocketChannel
from kvferry.engine.ranks.followers import Followers
from kvferry.engine.ranks.shard import shards_of
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.errors import SettingError
from kvferry.log import get_logger
from kvferry.runtime import Runtime
from kvferry.worker.engine import engine_settings
from kvferry.worker.handoff.channel import StreamChannel
from kvferry.worker.handoff.shards import RemoteShard
from kvferry.worker.rank_port import RankLink, RankPort
from kvferry.worker.settings import WorkerSettings

log = get_logger(__name__)
EXIT_RANK_LOST: Final = 71
END_TIMEOUT_S: Final = 10.0  # for a rank to free its memory


class RankProcesses:
    """Ranks 1, 2, … of this worker, if it has them. Leave it with `close`.

    The last ones may be on other hosts, where others have started them, and join by the rank port.
    """

    def __init__(
        self,
        memory: SharedMemory | None,
        processes: list[subprocess.Popen[bytes]],
        channels: list[SocketChannel],
        port: RankPort | None = None,
        num_remote: int = 0,
    ) -> None:
        """`memory`: None for a worker of one rank."""
        self._memory = memory
        self._processes = processes
        self._channels = channels  # to all ranks, once they have joined
        self._port = port
        self._num_remote = num_remote
        self._links: list[RankLink] = []
        self._followers: Followers | None = None
        self._watching: asyncio.AbstractEventLoop | None = None

    @classmethod
    def start(cls, settings: WorkerSettings, runtime: Runtime) -> RankProcesses:
        """They wait to be set up. To be called by a thread that lasts as long as they should. Raises `SettingError`."""
        size, num_remote = settings.tensor_parallel_size, settings.remote_ranks
        if num_remote >= size > 1 or num_remote > size == 1:
            raise SettingError("--remote-ranks", f"{num_remote}, of {size} ranks the first is the worker itself")
        if size == 1:
            return cls(None, [], [])
        if sys.platform != "linux":
            raise SettingError("--tensor-parallel-size", f"{size}, more than one rank needs Linux")
        _check_degree(settings)
        port = None
        if num_remote:
            port = RankPort(settings.host, settings.rank_port, settings.data_key_bytes, runtime)
        memory = SharedMemory.create(size)
        environ = {field: value for field, value in os.environ.items() if field != ready.READY_FD}
        processes, channels = [], []
        for rank in range(1, size - num_remote):
            own, theirs = socket.socketpair()
            with theirs:
                descriptors = (theirs.fileno(), *memory.descriptors)
                own_log = (settings.log_level, settings.log_format, f"{settings.name}-rank-{rank}")
                arguments = ("-P", "-m", "kvferry.worker.rank", *own_log, *map(str, descriptors))
                command = tethered(sys.executable, *arguments)
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environ, pass_fds=descriptors))
            channels.append(SocketChannel(own))
        return cls(memory, processes, channels, port, num_remote)

    def joined(self) -> Followers | None:
        """All of them, when those on other hosts have joined: blocks until then, and raises `RankLost` if `give_up` is
        called first. None for a worker of one rank."""
        if self._memory is None:
            return None
        if self._port is not None:
            log.info("waiting for ranks on other hosts", count=self._num_remote, address=self._port.address)
            self._links = self._port.accept(self._num_remote)
            self._port.close()
        copies = {rank: link.copies for rank, link in enumerate(self._links, 1 + len(self._channels))}
        self._channels += [link.steps for link in self._links]
        host = self._links[0].host if self._links else ""
        self._followers = Followers(self._memory, self._channels, copies, host)
        return self._followers

    async def shards(self) -> tuple[RemoteShard, ...]:
        """The ranks on other hosts, to be told of hand-offs. To be called once, on the event loop, when all have
        joined."""
        channels = [await StreamChannel.open(link.handoffs.detach()) for link in self._links]
        first = 1 + len(self._channels) - len(channels)
        return tuple(RemoteShard(rank, channel) for rank, channel in enumerate(channels, first))

    def give_up(self) -> None:
        """Wait no longer for ranks to join. May be called by any thread."""
        if self._port is not None:
            self._port.close()

    def watch(self) -> None:
        """End this process as soon as a rank ends, or the channels were closed for a step that failed. To be called on
        the event loop when all ranks are ready."""
        self._watching = asyncio.get_running_loop()
        for rank, channel in enumerate(self._channels, 1):
            self._watching.add_reader(channel, self._lost, rank)

    def close(self) -> None:
        """End the ranks. Blocks until those on this host have ended."""
        self.give_up()
        if self._watching is not None:
            for channel in self._channels:
                self._watching.remove_reader(channel)
        if self._followers is not None:
            self._followers.close()
        for channel in self._channels:
            channel.end()
        for process in self._processes:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for channel in self._channels:
            channel.close()
        for link in self._links:
            link.close()
        if self._memory is not None:
            self._memory.close()

    def _lost(self, rank: int) -> None:
        code = None
        if rank <= len(self._processes):
            process = self._processes[rank - 1]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # its channel closes a moment before it is gone
            code = process.returncode
        log.error("a rank has ended: exiting", rank=rank, code=code)
        if code is not None and -code == signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)  # killed from outside, as the supervisor should see it
        os._exit(EXIT_RANK_LOST)  # the engine thread may never return: nothing can be waited for


def _check_degree(settings: WorkerSettings) -> None:
    """Before any process is started. Raises `SettingError` for a model that can't be cut into so many parts."""
    if not settings.model:
        return  # load_engine says so
    try:
        shards_of(ModelConfig.read(engine_settings(settings).model_dir), settings.tensor_parallel_size)
    except SettingError as error:
        raise SettingError("--tensor-parallel-size", error.problem) from None


@contextlib.contextmanager
def ranks_of(settings: WorkerSettings, runtime: Runtime) -> Iterator[RankProcesses]:
    """The other ranks of a worker, if it has any, until the end of the block."""
    ranks = RankProcesses.start(settings, runtime)
    try:
        yield ranks
    finally:
        ranks.close()
