from __future__ import annotations

from typing import Any

import pytest
from sequences import KV, sequence_of

from kvferry.schedule.sequence import Sequence
from kvferry.wire.flow import Manifest
from kvferry.wire.logprobs import TokenLogprobs, pack_logprobs
from kvferry.wire.sampling import Sampling
from kvferry.worker.handoff.incoming import Incoming
from kvferry_decode.verdict import Right, Wrong, judge

NUM_FRAMES = 3
FOUND = TokenLogprobs(-0.5, (7,), (-0.5,))


def part_of(sequence: Sequence, from_token: int = 0, **fields: Any) -> Incoming:
    """A part that is whole, with the manifest that fits it."""
    right = {
        "num_frames": NUM_FRAMES,
        "kv_format_id": KV.format_id,
        "hash_from": sequence.chain_hash(from_token),
        "hash_end": sequence.chain_hash(sequence.num_context),
        "first_tokens": ((0, 7),),
    }
    manifest = Manifest(**{**right, **fields})
    return Incoming(1, from_token, 0, manifest=manifest, manifest_frame=NUM_FRAMES)


def test_a_whole_pull_whose_manifests_fit_lets_the_sequence_run_on_token_0_of_its_choice() -> None:
    sequence = sequence_of(9, choice=1)
    leaders = part_of(sequence, 4, first_tokens=((0, 7), (1, 8)))
    assert judge(sequence, KV.format_id, leaders, [part_of(sequence, 4)]) == Right(8, None)


WRONG = {
    "kv_format": {"kv_format_id": "another"},
    "frame_count": {"num_frames": NUM_FRAMES + 1},
    "chain_hash": {"hash_end": b"x" * 16},
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("place", ["leaders", "others"])
def test_a_manifest_of_any_part_that_does_not_fit_is_a_fault(fault: str, place: str) -> None:
    sequence = sequence_of(9)
    right, wrong = part_of(sequence), part_of(sequence, **WRONG[fault])
    leaders, other = (wrong, right) if place == "leaders" else (right, wrong)
    assert judge(sequence, KV.format_id, leaders, [right, other]) == Wrong(fault)


def test_kv_that_begins_elsewhere_is_a_fault() -> None:
    sequence = sequence_of(9)
    leaders = part_of(sequence, 4, hash_from=sequence.chain_hash(0))
    assert judge(sequence, KV.format_id, leaders, []) == Wrong("chain_hash")


def test_log_probabilities_that_are_wanted_must_be_there() -> None:
    sequence = sequence_of(9, sampling=Sampling(temperature=0.0, max_tokens=8, num_logprobs=1))
    with_them = part_of(sequence, logprobs=pack_logprobs([(0, FOUND)]))
    assert judge(sequence, KV.format_id, with_them, []) == Right(7, FOUND)
    assert judge(sequence, KV.format_id, part_of(sequence), []) == Wrong("first_token")


def test_a_manifest_without_token_0_of_the_choice_is_a_fault() -> None:
    sequence = sequence_of(9, choice=2)
    assert judge(sequence, KV.format_id, part_of(sequence), []) == Wrong("first_token")
