"""Slot digests: equal bytes, equal digests, and one flipped bit is seen in its slot alone."""

import numpy as np
import pytest

from kvferry.kv.digest import slot_digest, slot_digests

LAYERS, TOKENS, ROW = 3, 5, 2 * 4 * 2  # row: kv_heads × head_dim × bf16


def payload() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (LAYERS, 2, TOKENS, ROW), dtype=np.uint8)


def test_digests_of_a_gathered_range_equal_those_of_single_tokens() -> None:
    kv = payload()
    single = [slot_digest(kv[:, :, token : token + 1].tobytes()) for token in range(TOKENS)]
    assert slot_digests(kv.tobytes(), LAYERS, TOKENS) == single
    assert len(set(single)) == TOKENS


def test_a_flipped_low_bit_changes_the_digest_of_its_slot_and_of_no_other() -> None:
    good, bad = payload(), payload()
    bad[1, 0, 2, 7] ^= 1
    pairs = zip(slot_digests(good.tobytes(), LAYERS, TOKENS), slot_digests(bad.tobytes(), LAYERS, TOKENS), strict=True)
    assert [a == b for a, b in pairs] == [True, True, False, True, True]


def test_key_and_value_swapped_is_seen() -> None:
    kv = payload()
    assert slot_digests(kv.tobytes(), LAYERS, TOKENS) != slot_digests(kv[:, ::-1].tobytes(), LAYERS, TOKENS)


@pytest.mark.parametrize(("layers", "tokens"), [(0, 5), (3, 0), (3, 7)])
def test_sizes_that_do_not_divide_are_refused(layers: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="bytes are not"):
        slot_digests(payload().tobytes(), layers, tokens)
