"""What a pull sends: pieces that tile exactly, every credit used up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sequences import KV

from kvferry.wire.frame import Piece
from kvferry.worker.handoff.outgoing import MANIFEST, MAX_AGAIN_QUEUED, PAD, Outgoing, cut

TOKEN_BYTES = 2 * KV.num_kv_heads * KV.head_dim * 2  # of one layer


@given(st.integers(1, 7), st.integers(0, 40), st.integers(1, 60), st.integers(TOKEN_BYTES, 40 * TOKEN_BYTES))
def test_pieces_tile_a_range_exactly_and_fit_their_slot(
    num_layers: int, start: int, length: int, max_bytes: int
) -> None:
    kv = replace(KV, num_layers=num_layers)
    cells = np.zeros((num_layers, length), np.int32)
    for piece in cut(kv, kv.all_heads, start, start + length, max_bytes):
        assert 0 < piece.num_bytes(kv.head_dim, kv.dtype) <= max_bytes
        assert (piece.head_start, piece.head_end) == (0, kv.num_kv_heads)
        cells[piece.layer_start : piece.layer_end, piece.token_start - start : piece.token_end - start] += 1
    assert (cells == 1).all()


def test_whole_layers_are_kept_together_where_they_fit() -> None:
    assert cut(KV, KV.all_heads, 0, 10, 20 * TOKEN_BYTES) == [Piece(0, 2, 0, 10, 0, 2), Piece(2, 3, 0, 10, 0, 2)]
    assert cut(KV, KV.all_heads, 4, 4, 100) == []


def drain(outgoing: Outgoing, finished: bool) -> list[tuple[int, object]]:
    sent = []
    while (item := outgoing.next(finished)) is not None:
        sent.append(item)
    return sent


def test_kv_is_sent_as_it_is_computed_and_the_manifest_last_and_pads_use_up_the_rest() -> None:
    outgoing = Outgoing(1, from_token=4, heads=KV.all_heads, credits=3)
    assert drain(outgoing, False) == []
    outgoing.computed(8, KV, 1 << 20)
    outgoing.computed(8, KV, 1 << 20)
    assert drain(outgoing, False) == [(0, Piece(0, 3, 4, 8, 0, 2))]
    outgoing.computed(12, KV, 1 << 20)
    outgoing.credits += 2
    assert drain(outgoing, True) == [(1, Piece(0, 3, 8, 12, 0, 2)), (2, MANIFEST), (3, PAD), (4, PAD)]
    assert outgoing.credits == 0


def test_a_pull_of_nothing_is_a_manifest_alone() -> None:
    outgoing = Outgoing(1, from_token=12, heads=KV.all_heads, credits=1)
    outgoing.computed(12, KV, 1 << 20)
    assert drain(outgoing, True) == [(0, MANIFEST)]


def test_a_bad_frame_is_sent_again_under_a_new_number_before_anything_else() -> None:
    outgoing = Outgoing(1, from_token=0, heads=KV.all_heads, credits=1)
    outgoing.computed(4, KV, 1 << 20)
    [(number, piece)] = drain(outgoing, False)
    outgoing.computed(8, KV, 1 << 20)
    outgoing.credits += 3
    assert outgoing.ask_again((number,))
    sent = drain(outgoing, True)
    assert [content for _, content in sent] == [piece, Piece(0, 3, 4, 8, 0, 2), MANIFEST]
    outgoing.credits += 1
    assert outgoing.ask_again((sent[-1][0],)), "the manifest, too"
    assert drain(outgoing, True) == [(4, MANIFEST)]


def test_a_frame_that_was_never_sent_or_too_many_are_not_given_again() -> None:
    outgoing = Outgoing(1, from_token=0, heads=KV.all_heads, credits=1)
    outgoing.computed(4, KV, 1 << 20)
    drain(outgoing, False)
    assert not outgoing.ask_again((1,))
    for _ in range(MAX_AGAIN_QUEUED):
        assert outgoing.ask_again((0,))
    assert not outgoing.ask_again((0,))


def test_a_stopped_pull_sends_pads_alone_and_remembers_none() -> None:
    outgoing = Outgoing(1, from_token=0, heads=KV.all_heads, credits=2)
    outgoing.computed(8, KV, 1 << 20)
    outgoing.stopped = True
    assert [content for _, content in drain(outgoing, True)] == [PAD, PAD]
    assert not outgoing.ask_again((0,))


@given(
    st.lists(st.sampled_from(["credit", "compute", "bad", "finish"]), max_size=60),
    st.booleans(),
)
def test_whatever_happens_all_kv_and_one_manifest_go_out_under_numbers_that_never_repeat(
    events: list[str], stop: bool
) -> None:
    outgoing = Outgoing(1, from_token=0, heads=KV.all_heads, credits=1)
    total, computed = 40, 0
    sent: list[tuple[int, object]] = []
    bad: set[int] = set()
    for event in [*events, *["compute"] * 10]:
        if event == "credit":
            outgoing.credits += 1
        elif event == "compute":
            computed = min(total, computed + 4)
            outgoing.computed(computed, KV, 3 * TOKEN_BYTES)
        elif event == "bad" and sent:
            frame = sent[-1][0]
            if frame not in bad and outgoing.ask_again((frame,)):
                bad.add(frame)
                outgoing.credits += 1
        sent += drain(outgoing, computed == total)
    outgoing.credits += 400
    sent += drain(outgoing, True)
    assert [frame for frame, _ in sent] == list(range(len(sent)))
    good = [content for frame, content in sent if frame not in bad]
    pieces = [content for content in good if isinstance(content, Piece)]
    assert sorted(pieces, key=repr) == sorted(set(pieces), key=repr)
    assert sum(piece.num_layers * piece.num_tokens for piece in pieces) == KV.num_layers * total
    assert good.count(MANIFEST) == 1
