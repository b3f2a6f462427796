"""The KV of several ranks as one, to copy to frames and from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from kvferry.engine.limits import Limits
from kvferry.schedule.step import BlockTable, KVFormat
from kvferry.wire.frame import Piece


class Cache(Protocol):
    """KV of one rank's heads, here or there."""

    heads: range

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        """Copy what it has of a checked piece to its place in the frame."""

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        """The reverse of `gather`."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Cache)


def apart(caches: Iterable[C]) -> Iterator[C]:
    """Those of one KV head each: ranks that share a head have the same content."""
    before: range | None = None
    for cache in caches:
        if cache.heads != before:
            yield cache
        before = cache.heads


class Caches:
    """Implements `KVStore`."""

    def __init__(self, caches: Sequence[Cache], limits: Limits) -> None:
        """`caches`: of ranks that follow each other."""
        self._limits = limits
        self._all = caches
        self._apart = list(apart(caches))
        self.heads = range(caches[0].heads.start, caches[-1].heads.stop)

    @property
    def kv_format(self) -> KVFormat:
        return self._limits.kv_format

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._limits.check_piece(piece, block_table, out.nbytes)
        for cache in self._apart:
            cache.gather(piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._limits.check_piece(piece, block_table, payload.nbytes)
        for cache in self._all:
            cache.scatter(piece, block_table, payload)
