"""A sequence of this worker, as the pump that sends its KV sees it."""

from __future__ import annotations

from collections.abc import Callable

from kvferry.runtime import now
from kvferry.schedule.sequence import Key, Sequence
from kvferry.schedule.step import BlockTable
from kvferry.wire.flow import Manifest
from kvferry.wire.logprobs import pack_logprobs
from kvferry_prefill.scheduler import PrefillScheduler


class Sources:
    """Of all sequences."""

    def __init__(self, scheduler: PrefillScheduler, kv_format_id: str, unpin: Callable[[Sequence], None]) -> None:
        self.scheduler = scheduler
        self.kv_format_id = kv_format_id
        self.unpin = unpin
        self.computed_at: dict[Key, float] = {}  # when the last step of a held sequence had ended

    def of(self, sequence: Sequence) -> SequenceSource:
        return SequenceSource(self, sequence)


class SequenceSource:
    """Implements `Source`."""

    def __init__(self, sources: Sources, sequence: Sequence) -> None:
        self._sources = sources
        self._sequence = sequence

    @property
    def request_id(self) -> str:
        return self._sequence.work.request_id

    @property
    def block_table(self) -> BlockTable | None:
        held = self._sources.scheduler.sequences.get(self._sequence.key) is self._sequence
        return self._sequence.block_table if held else None

    @property
    def finished(self) -> bool:
        return self._sequence.key in self._sources.scheduler.first_tokens

    def manifest(self, from_token: int, num_frames: int) -> Manifest:
        scheduler, sequence = self._sources.scheduler, self._sequence
        logprobs = scheduler.first_logprobs.get(sequence.key)
        return Manifest(
            num_frames=num_frames,
            kv_format_id=self._sources.kv_format_id,
            hash_from=sequence.chain_hash(from_token),
            hash_end=sequence.chain_hash(sequence.num_context),
            first_tokens=((sequence.work.choice, scheduler.first_tokens[sequence.key]),),
            cached_tokens=sequence.cached_tokens,
            elapsed_s=max(0.0, now() - self._sources.computed_at.get(sequence.key, now())),
            logprobs=None if logprobs is None else pack_logprobs([(0, logprobs)]),
        )

    def pin(self) -> None:
        self._sources.scheduler.memory.pin(self._sequence)

    def unpin(self) -> None:
        self._sources.unpin(self._sequence)
