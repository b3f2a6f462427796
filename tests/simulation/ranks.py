"""The other ranks of simulated workers: processes of their own, that can be killed, stopped, or slow.

They are led by the production code (`kvferry.engine.ranks`), over channels within the one thread. A step ends when all
ranks have computed it: the engine's lane waits while one of them is stopped, and for ever once one is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from processes import acting_as, process_name

from kvferry.engine.ranks.following import DirectChannel, Load


class SimulatedRanks:
    """Ranks 1, 2, … of one worker's process."""

    def __init__(self) -> None:
        self.late_s = 0.0  # most seconds that one of them comes late to a step
        self._channels: dict[int, DirectChannel] = {}
        self._stopped: dict[int, None] = {}
        self._resume: tuple[str | None, Callable[[], None]] | None = None  # (process, what waits there)

    def connect(self, rank: int, load: Load) -> DirectChannel:
        """The leader's end."""
        self._channels[rank] = DirectChannel(load)
        return self._channels[rank]

    @property
    def numbers(self) -> list[int]:
        return list(self._channels)

    @property
    def lost(self) -> bool:
        """One is dead."""
        return any(channel.ended for channel in self._channels.values())

    @property
    def hang(self) -> bool:
        """A step that needs them does not end now."""
        return bool(self._stopped) or self.lost

    def kill(self, rank: int) -> None:
        self._channels[rank].end()

    def stop(self, rank: int) -> None:
        """As SIGSTOP does."""
        self._stopped[rank] = None

    def resume(self, rank: int) -> None:
        """As SIGCONT does."""
        del self._stopped[rank]
        if self._resume is not None and not self.hang:
            (process, call), self._resume = self._resume, None
            with acting_as(process):
                asyncio.get_running_loop().call_soon(call)

    def when_resumed(self, call: Callable[[], None]) -> None:
        """Call it, as an event of this process, when all of them go on."""
        self._resume = (process_name.get(), call)
