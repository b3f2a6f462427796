"""KV frames into a pull of the decode worker (`land`, `Incoming`), with a link and a peer that do anything to them.

A frame is taken or it is a `CorruptFrame`. What was damaged on its way is never taken; what is taken is written inside
the pull's own blocks and nowhere else; and a pull whose verdict is good holds exactly the KV that was sent.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from fuzz.campaign import Batch
from fuzz.frames import SLOT_BYTES, Source, damaged, resealed

from kvferry.engine.memory.runner import MemoryRunner, MemorySettings
from kvferry.errors import CorruptFrame
from kvferry.wire.flow import Manifest
from kvferry.wire.frame import HEADER_BYTES, Piece
from kvferry.worker.handoff.incoming import Incoming, Tiling, land

SETTINGS: Final = MemorySettings(num_blocks=16)
TABLE: Final = np.array([9, 2, 14, 5], np.int32)  # of the pull; all other blocks are somebody else's
PULL_ID: Final = 7
RANDOM: Final = 0.1
GOOD: Final = 0.5  # share of frames that come as they were sent


class Pull:
    """One pull of a prompt's KV, as both sides have it."""

    def __init__(self, batch: Batch) -> None:
        chance = batch.chance
        self.batch = batch
        self.from_token = chance.choice((0, 0, 16, 32))
        prompt = [chance.randrange(256) for _ in range(chance.randint(self.from_token + 1, 64))]
        self.source = Source(MemoryRunner(SETTINGS), prompt, self.from_token)
        self.runner = MemoryRunner(SETTINGS)
        self.kv = self.runner.kv_format
        self.tiling = Tiling(self.kv, self.kv.all_heads, self.from_token, len(prompt))
        self.incoming = Incoming(PULL_ID, self.from_token, self.tiling.missing_bytes)
        self.left: list[Piece] = self.source.pieces(chance)
        self.forged = False  # a frame with a good checksum and another content was taken: only the hashes tell
        self._slot = memoryview(bytearray(SLOT_BYTES))
        self._before = self.content()

    def content(self) -> bytes:
        """All bytes outside the pull's blocks."""
        table = np.setdiff1d(np.arange(SETTINGS.num_blocks, dtype=np.int32), TABLE)
        whole = Piece(0, self.kv.num_layers, 0, len(table) * self.kv.block_size, 0, self.kv.num_kv_heads)
        out = bytearray(whole.num_bytes(self.kv.head_dim, self.kv.dtype))
        self.runner.gather(whole, table, memoryview(out))
        return bytes(out)

    def deliver(self, frame: bytes, number: int) -> bool:
        """Whether it was taken."""
        length = min(len(frame), SLOT_BYTES)
        self._slot[:length] = frame[:length]
        try:
            landed = land(self.runner, self.tiling, TABLE, self._slot, length, PULL_ID, number)
        except CorruptFrame:
            self.incoming.bad()
            return False
        self.incoming.good(landed)
        return True

    def judge(self) -> None:
        """The verdict, if all has come; and that nobody else's memory was touched."""
        assert self.content() == self._before, "a frame was written outside its pull's blocks"
        if not self.incoming.whole:
            return
        fault = self.incoming.fault(self.kv.format_id, self.source.hash_from, self.source.hash_end)
        self.incoming.first(0, with_logprobs=True)
        if fault is None and not self.forged:
            whole = Piece(0, self.kv.num_layers, self.from_token, len(self.source.prompt), 0, self.kv.num_kv_heads)
            out = bytearray(whole.num_bytes(self.kv.head_dim, self.kv.dtype))
            self.runner.gather(whole, TABLE, memoryview(out))
            assert bytes(out) == self.source.payload(whole), "a pull with a good verdict holds other KV"


def frames_plane(batch: Batch) -> None:
    pull = Pull(batch)
    for _ in range(batch.num_cases):
        over = not pull.left and pull.incoming.manifest is not None
        if over or pull.incoming.whole or batch.chance.random() < 0.02:
            pull.judge()
            pull = Pull(batch)
        _case(batch, pull)
    pull.judge()


def _case(batch: Batch, pull: Pull) -> None:
    chance, source = batch.chance, pull.source
    number = pull.incoming.post()
    piece = pull.left[0] if pull.left and chance.random() < 0.9 else chance.choice(source.pieces(chance))
    is_manifest = not pull.left or chance.random() < 0.05
    right = (
        source.manifest_frame(_manifest(batch, pull, number), PULL_ID, number)
        if is_manifest
        else source.frame(piece, PULL_ID, number)
    )
    frame, mutated, is_resealed = right, True, False
    kind = chance.random()
    if kind < RANDOM:
        frame, mutated = chance.randbytes(chance.randrange(2 * HEADER_BYTES)), False
    elif kind < RANDOM + 0.2:
        frame = damaged(chance, right)
    elif kind < 1 - GOOD:
        frame, is_resealed = resealed(chance, source, piece, PULL_ID, number), True
    with batch.trying((number, frame)):
        taken = pull.deliver(frame, number)
    if taken and not is_resealed:
        assert frame == right, "a damaged frame was taken"
    if frame == right and not is_manifest and piece in pull.left:
        pull.left.remove(piece)  # it is there, or a forged one lies in its place
    pull.forged |= taken and is_resealed
    batch.count(mutated=mutated, valid=taken)


def _manifest(batch: Batch, pull: Pull, number: int) -> Manifest:
    """Most often the right one."""
    chance = batch.chance
    fields = chance.choice(
        (
            {}, {}, {}, {}, {"hash_end": chance.randbytes(16)}, {"hash_from": chance.randbytes(16)},
            {"first_tokens": ()}, {"kv_format_id": "other"}, {"num_frames": number + 1},
            {"first_tokens": ((1, 5), (0, (1 << 32) - 1))},
        )
    )  # fmt: skip
    return pull.source.manifest(number, 5, **fields)
