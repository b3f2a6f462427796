"""KV frames of one sequence as a right prefill worker makes them, and what becomes of them on a bad way."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from fuzz.spoiling import spoiled

from kvferry.engine.memory.runner import MemoryRunner
from kvferry.kv.hashing import chain_hash, root_hash
from kvferry.schedule.step import KVFormat, SequenceStep, StepPlan
from kvferry.wire.flow import Manifest, ManifestCodec
from kvferry.wire.frame import (
    DTYPE_CODES,
    HEADER_BYTES,
    KIND_KV,
    KIND_MANIFEST,
    KIND_PAD,
    NO_PIECE,
    FrameHeader,
    Piece,
    seal,
)

SLOT_BYTES: Final = 1 << 16
PIECE_FIELDS: Final = ("layer_start", "layer_end", "token_start", "token_end", "head_start", "head_end")
ODD: Final = (0, 1, 2, 15, 16, 17, 255, 256, 65535)  # fits every field of a header


def sealed(header: FrameHeader, payload: bytes) -> bytes:
    """The frame's bytes."""
    slot = memoryview(bytearray(HEADER_BYTES + len(payload)))
    slot[HEADER_BYTES:] = payload
    return bytes(slot[: seal(slot, header)]) if header.payload_bytes == len(payload) else _misfit(header, slot)


def _misfit(header: FrameHeader, slot: memoryview) -> bytes:
    """One whose header promises another length than it has."""
    wide = memoryview(bytearray(max(len(slot), HEADER_BYTES + header.payload_bytes)))
    wide[: len(slot)] = slot
    seal(wide, header)
    return bytes(wide[: len(slot)])


class Source:
    """A prompt whose KV is computed, and its frames."""

    def __init__(self, runner: MemoryRunner, prompt: list[int], from_token: int, salt: bytes = b"") -> None:
        self.kv: KVFormat = runner.kv_format
        self.prompt = prompt
        self.from_token = from_token
        self._runner = runner
        tokens = np.asarray(prompt, np.uint32)
        self._table = np.arange(-(-len(prompt) // self.kv.block_size), dtype=np.int32)
        runner.execute(StepPlan((SequenceStep(0, tokens, 0, self._table),)))
        root = root_hash(self.kv.format_id, "", salt)
        self.hash_from = chain_hash(root, tokens, self.kv.block_size, from_token)
        self.hash_end = chain_hash(root, tokens, self.kv.block_size, len(prompt))

    def pieces(self, chance: random.Random) -> list[Piece]:
        """The range in pieces, cut by chance in tokens and layers."""
        kv, end = self.kv, len(self.prompt)
        places = sorted({self.from_token, end, *(chance.randrange(self.from_token, end) for _ in range(2))})
        made = []
        for start, stop in pairwise(places):
            layers = [0, kv.num_layers] if chance.random() < 0.5 else list(range(kv.num_layers + 1))
            made += [Piece(low, high, start, stop, 0, kv.num_kv_heads) for low, high in pairwise(layers)]
        return made

    def payload(self, piece: Piece) -> bytes:
        out = bytearray(piece.num_bytes(self.kv.head_dim, self.kv.dtype))
        self._runner.gather(piece, self._table, memoryview(out))
        return bytes(out)

    def frame(self, piece: Piece, pull_id: int, number: int) -> bytes:
        payload = self.payload(piece)
        return sealed(FrameHeader(KIND_KV, pull_id, number, piece, self.kv.dtype, len(payload)), payload)

    def manifest(self, number: int, token: int, **fields: Any) -> Manifest:
        made = {
            "num_frames": number, "kv_format_id": self.kv.format_id, "hash_from": self.hash_from,
            "hash_end": self.hash_end, "first_tokens": ((0, token),), **fields,
        }  # fmt: skip
        return Manifest(**made)

    def manifest_frame(self, manifest: Manifest, pull_id: int, number: int) -> bytes:
        payload = ManifestCodec().encode(manifest)
        return sealed(FrameHeader(KIND_MANIFEST, pull_id, number, NO_PIECE, self.kv.dtype, len(payload)), payload)

    def pad(self, pull_id: int, number: int) -> bytes:
        return sealed(FrameHeader(KIND_PAD, pull_id, number, NO_PIECE, self.kv.dtype, 0), b"")


def resealed(chance: random.Random, source: Source, piece: Piece, pull_id: int, number: int) -> bytes:
    """A frame with a good checksum and a header that says something else than it should."""
    payload = source.payload(piece)
    header = FrameHeader(KIND_KV, pull_id, number, piece, source.kv.dtype, len(payload))
    match chance.randrange(6):
        case 0:
            header = replace(header, piece=replace(piece, **{chance.choice(PIECE_FIELDS): chance.choice(ODD)}))
        case 1:
            header = replace(header, dtype=chance.choice(list(DTYPE_CODES)))
        case 2:
            header = replace(header, kind=chance.choice((KIND_MANIFEST, KIND_PAD)))
        case 3:
            header = replace(header, pull_id=chance.choice((pull_id + 1, 0, (1 << 32) - 1)))
        case 4:
            header = replace(header, frame=number + chance.choice((1, 2)))
        case _:
            payload = payload[: chance.randrange(len(payload))]
            header = replace(header, payload_bytes=chance.choice((len(payload), len(payload) + 1, 0)))
    return sealed(header, payload)


def damaged(chance: random.Random, frame: bytes) -> bytes:
    """As a broken link leaves it: no longer than a slot."""
    if chance.random() < 0.3:
        place = chance.randrange(len(frame))
        return frame[:place] + bytes([frame[place] ^ (1 << chance.randrange(8))]) + frame[place + 1 :]
    return spoiled(chance, frame)[:SLOT_BYTES]
