"""Digests of transferred token slots, kept on both sides so that a test or benchmark can compare the pools.

They are computed from the blocks themselves, after the scatter on D, and have nothing in common with the
frames' checksum. Off unless `debug_digests` is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvferry.kv.digest import slot_digests
from kvferry.lane import Lane
from kvferry.schedule.sequence import Sequence
from kvferry.schedule.step import BlockTable, ModelRunner
from kvferry.wire.frame import Piece

MAX_SEQUENCES: Final = 1024
TOKENS_AT_ONCE: Final = 256


class Digests:
    """ticket -> {position: digest}, for the newest transfers."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._kept: dict[str, dict[int, str]] = {}

    async def take(
        self,
        runner: ModelRunner,
        copy_lane: Lane,
        sequence: Sequence,
        from_token: int,
        unpin: Callable[[Sequence], None],
    ) -> None:
        """Digest a pinned sequence's context from `from_token` on, keep that, unpin."""
        try:
            end = sequence.num_context
            rows = await copy_lane.run(digest_tokens, runner, sequence.block_table.copy(), from_token, end)
            self.keep(sequence.work.ticket, rows)
        finally:
            unpin(sequence)

    def keep(self, ticket: bytes, digests: dict[int, str]) -> None:
        self._kept[ticket.hex()] = digests
        while len(self._kept) > MAX_SEQUENCES:
            del self._kept[next(iter(self._kept))]

    def rows(self) -> dict[str, dict[int, str]]:
        return dict(self._kept)


def digest_tokens(runner: ModelRunner, block_table: BlockTable, start: int, end: int) -> dict[int, str]:
    """Digest of every token slot in [start, end), all layers and heads. Runs on the copy lane."""
    kv = runner.kv_format
    digests: dict[int, str] = {}
    for first in range(start, end, TOKENS_AT_ONCE):
        last = min(end, first + TOKENS_AT_ONCE)
        piece = Piece(0, kv.num_layers, first, last, 0, kv.num_kv_heads)
        buffer = memoryview(bytearray(piece.num_bytes(kv.head_dim, kv.dtype)))
        runner.gather(piece, block_table, buffer)
        for position, digest in enumerate(slot_digests(buffer, kv.num_layers, last - first), first):
            digests[position] = digest.hex()
    return digests
