"""What a pull accepts: frames that tile its range once, and a manifest that fits. Everything else is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvferry.engine.memory.runner import MemoryRunner, MemorySettings
from kvferry.errors import CorruptFrame
from kvferry.wire.flow import Manifest, ManifestCodec
from kvferry.wire.frame import (
    HEADER_BYTES,
    KIND_KV,
    KIND_MANIFEST,
    NO_PIECE,
    FrameHeader,
    Piece,
    seal,
)
from kvferry.worker.handoff.incoming import MAX_AGAIN, WINDOW, Incoming, Landed, Tiling, land

SETTINGS = MemorySettings(num_blocks=4)
KV = SETTINGS.kv_format
TABLE = np.array([2, 0, 3], np.int32)
START, END = 16, 40
WHOLE = Piece(0, KV.num_layers, START, END, 0, KV.num_kv_heads)
FILL = 0x5A


class Landing:
    """A runner, the tiling of one pull, and a slot to build frames in."""

    def __init__(self) -> None:
        self.runner = MemoryRunner(SETTINGS)
        self.tiling = Tiling(KV, KV.all_heads, START, END)
        self.slot = memoryview(bytearray(1 << 16))

    def frame(self, piece: Piece = WHOLE, frame: int = 0, **header: object) -> int:
        num_bytes = piece.num_bytes(KV.head_dim, KV.dtype)
        made = FrameHeader(KIND_KV, 7, frame, piece, KV.dtype, num_bytes)
        made = replace(made, **header)  # type: ignore[arg-type]
        self.slot[HEADER_BYTES : HEADER_BYTES + made.payload_bytes] = bytes([FILL]) * made.payload_bytes
        return seal(self.slot, made)

    def land(self, received: int, frame: int = 0) -> Landed:
        return land(self.runner, self.tiling, TABLE, self.slot, received, 7, frame)

    def written(self) -> int:
        """Bytes of the range that a scatter has reached."""
        out = memoryview(bytearray(WHOLE.num_bytes(KV.head_dim, KV.dtype)))
        self.runner.gather(WHOLE, TABLE, out)
        return bytes(out).count(FILL)


def test_a_good_frame_is_scattered_and_a_range_is_complete_when_all_its_cells_have_come() -> None:
    landing = Landing()
    first = landing.land(landing.frame(replace(WHOLE, layer_end=1)))
    assert first.missing_bytes == WHOLE.num_bytes(KV.head_dim, KV.dtype) * (KV.num_layers - 1) // KV.num_layers
    rest = landing.land(landing.frame(replace(WHOLE, layer_start=1), frame=1), frame=1)
    assert rest.missing_bytes == 0
    assert landing.written() == WHOLE.num_bytes(KV.head_dim, KV.dtype)


def test_a_range_of_no_tokens_is_complete_from_the_start() -> None:
    assert Tiling(KV, KV.all_heads, 16, 16).missing_bytes == 0
    assert Tiling(KV, KV.all_heads, 16, 17).missing_bytes == KV.token_bytes


def _flip(landing: Landing, received: int) -> int:
    landing.slot[HEADER_BYTES + 5] ^= 1
    return received


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("short", lambda landing: landing.frame() - 1),
        ("short", lambda landing: HEADER_BYTES - 1),
        ("long", lambda landing: landing.frame() + 1),
        ("checksum", lambda landing: _flip(landing, landing.frame())),
        ("identity", lambda landing: landing.frame(pull_id=8)),
        ("identity", lambda landing: landing.frame(frame=1)),
        ("range", lambda landing: landing.frame(replace(WHOLE, token_start=START - 1))),
        ("range", lambda landing: landing.frame(replace(WHOLE, token_end=END + 1))),
        ("range", lambda landing: landing.frame(replace(WHOLE, layer_end=KV.num_layers + 1))),
        ("range", lambda landing: landing.frame(replace(WHOLE, head_end=1))),
        ("range", lambda landing: landing.frame(replace(WHOLE, token_start=END))),
        ("range", lambda landing: landing.frame(dtype="float16")),
        ("size", lambda landing: landing.frame(payload_bytes=64)),
        ("manifest", lambda landing: landing.frame(NO_PIECE, kind=KIND_MANIFEST, payload_bytes=9)),
    ],
)
def test_a_bad_frame_is_told_apart_and_nothing_of_it_is_written(reason: str, spoil: Callable[[Landing], int]) -> None:
    landing = Landing()
    with pytest.raises(CorruptFrame) as caught:
        landing.land(spoil(landing))
    assert caught.value.reason == reason
    assert landing.written() == 0
    assert landing.land(landing.frame()).missing_bytes == 0, "a bad frame does not spoil the good one that follows"


def test_kv_that_comes_twice_is_an_error_and_never_a_rewrite() -> None:
    landing = Landing()
    landing.land(landing.frame(replace(WHOLE, layer_end=1)))
    with pytest.raises(CorruptFrame, match="twice"):
        landing.land(landing.frame(frame=1), frame=1)
    assert landing.tiling.missing_bytes > 0


def manifest_of(**fields: object) -> Manifest:
    made = {
        "num_frames": 1,
        "kv_format_id": KV.format_id,
        "hash_from": b"a" * 16,
        "hash_end": b"b" * 16,
        "first_tokens": ((0, 5),),
        **fields,
    }
    return Manifest(**made)  # type: ignore[arg-type]


def landed(kind: int, frame: int, manifest: Manifest | None = None, missing: int = 0) -> Landed:
    return Landed(FrameHeader(kind, 7, frame, NO_PIECE, KV.dtype, 0), manifest, missing)


def test_a_manifest_travels_through_a_frame() -> None:
    landing = Landing()
    payload = ManifestCodec().encode(manifest_of())
    header = FrameHeader(KIND_MANIFEST, 7, 0, NO_PIECE, KV.dtype, len(payload))
    landing.slot[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    assert landing.land(seal(landing.slot, header)).manifest == manifest_of()


FRAME = 1000  # bytes of KV in a full frame


def test_the_window_is_kept_full_until_the_end_comes_into_sight_and_nothing_is_asked_for_after_the_manifest() -> None:
    incoming = Incoming(7, START, missing_bytes=10 * FRAME)
    assert [incoming.post() for _ in range(3)] == [0, 1, 2]
    assert incoming.num_wanted(0, FRAME) == WINDOW
    assert incoming.num_wanted(WINDOW - 1, FRAME) == 1
    incoming.good(landed(KIND_KV, 0, missing=FRAME + 1))
    assert incoming.num_wanted(0, FRAME) == 3, "two frames at the least, and the manifest"
    assert incoming.num_wanted(3, FRAME) == 0
    incoming.good(landed(KIND_KV, 1, missing=0))
    assert incoming.num_wanted(0, FRAME) == 1, "the manifest has yet to come"
    assert not incoming.whole
    incoming.good(landed(KIND_MANIFEST, 2, manifest_of()))
    assert incoming.num_wanted(0, FRAME) == 0
    assert incoming.whole


def test_something_is_always_asked_for_while_something_is_missing() -> None:
    """However small P's frames are against D's slots: else a pull could wait for frames that nobody may send."""
    for missing in (1, FRAME, 3 * FRAME, 3 * FRAME + 1):
        assert Incoming(7, START, missing).num_wanted(0, FRAME) >= 2


def test_a_pull_that_is_over_asks_for_nothing() -> None:
    incoming = Incoming(7, START, missing_bytes=10 * FRAME)
    incoming.over = True
    assert incoming.num_wanted(0, FRAME) == 0


def test_a_frame_that_was_checked_before_another_does_not_bring_the_range_back() -> None:
    incoming = Incoming(7, START, missing_bytes=2)
    incoming.good(landed(KIND_KV, 1, missing=0))
    incoming.good(landed(KIND_KV, 0, missing=1))
    assert incoming.missing_bytes == 0


def test_a_manifest_before_the_last_kv_frame_does_not_make_the_pull_whole() -> None:
    incoming = Incoming(7, START, missing_bytes=FRAME)
    incoming.good(landed(KIND_MANIFEST, 0, manifest_of(), missing=FRAME))
    assert not incoming.whole
    incoming.good(landed(KIND_KV, 1, missing=0))
    assert incoming.whole


@pytest.mark.parametrize(
    ("fault", "fields"),
    [
        (None, {}),
        ("kv_format", {"kv_format_id": "other"}),
        ("frame_count", {"num_frames": 2}),
        ("chain_hash", {"hash_from": b"x" * 16}),
        ("chain_hash", {"hash_end": b"x" * 16}),
    ],
)
def test_a_sequence_may_run_only_if_the_manifest_fits_in_every_field(
    fault: str | None, fields: dict[str, object]
) -> None:
    incoming = Incoming(7, START, missing_bytes=0)
    incoming.good(landed(KIND_MANIFEST, 1, manifest_of(**fields)))
    assert incoming.fault(KV.format_id, b"a" * 16, b"b" * 16) == fault


def test_so_many_bad_frames_are_asked_for_again_and_no_more() -> None:
    incoming = Incoming(7, START, missing_bytes=FRAME)
    assert [incoming.bad() for _ in range(MAX_AGAIN + 1)] == [True] * MAX_AGAIN + [False]
