"""The steps that a scheduler has planned and that have not ended: each pins its sequences."""

from __future__ import annotations

from collections import deque

from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Sequence


class StepsUnderWay:
    """In the order in which they run: the one that does, and the one that was planned ahead, if there is one."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._steps: deque[list[Sequence]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def newest(self) -> list[Sequence]:
        """Sequences of the step that was planned last."""
        return self._steps[-1]

    def begin(self, sequences: list[Sequence]) -> None:
        """A step of these sequences, in their order, has been planned."""
        for sequence in sequences:
            self._memory.pin(sequence)
        self._steps.append(sequences)

    def end(self) -> list[Sequence]:
        """The oldest step has ended. Its sequences are still pinned: the caller unpins them."""
        return self._steps.popleft()

    def take_back(self) -> None:
        """The newest step will not run."""
        for sequence in self._steps.pop():
            self._memory.unpin(sequence)

    def abandon(self) -> list[Sequence]:
        """All have ended, and gave nothing. Their sequences, each once."""
        abandoned = {sequence.sequence_id: sequence for step in self._steps for sequence in step}
        while self._steps:
            self.take_back()
        return list(abandoned.values())
