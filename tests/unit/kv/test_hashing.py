"""Block hashes against written-down vectors: both ends of a pull, and every version, must agree on them."""

import numpy as np
import pytest

from kvferry.kv.hashing import block_hashes, chain_hash, root_hash

TOKENS = np.arange(1, 11, dtype=np.uint32)  # two full blocks of 4 and a tail of 2
ROOT = bytes.fromhex("93ae0583de10391e00fb48d9b5f46f83")
BLOCKS = [bytes.fromhex("2b8641a7254f8f9c708eec424196d720"), bytes.fromhex("88f5797281e23cd43134f25f6f63636b")]
TAIL = bytes.fromhex("0725ff38ddb5114d7cfe368b3540cf85")


def test_the_root_has_the_written_down_values() -> None:
    assert root_hash("fmt") == ROOT
    assert root_hash("fmt", "lora-1", b"salt") == bytes.fromhex("0c4647ea188dc481def23799525f8af3")


def test_each_full_block_has_the_written_down_hash_and_the_tail_has_none() -> None:
    assert block_hashes(ROOT, TOKENS, 4) == BLOCKS


def test_the_chain_hash_covers_full_blocks_and_then_the_tail_as_a_shorter_block() -> None:
    assert chain_hash(ROOT, TOKENS, 4, 0) == ROOT
    assert chain_hash(ROOT, TOKENS, 4, 4) == BLOCKS[0]
    assert chain_hash(ROOT, TOKENS, 4, 8) == BLOCKS[1]
    assert chain_hash(ROOT, TOKENS, 4, 10) == TAIL


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("ab", "c", b""), ("a", "bc", b"")),
        (("ab", "", b"c"), ("ab", "c", b"")),
        (("a", "", b""), ("b", "", b"")),
    ],
)
def test_roots_of_other_formats_adapters_or_salts_differ(
    left: tuple[str, str, bytes], right: tuple[str, str, bytes]
) -> None:
    assert root_hash(*left) != root_hash(*right)


def test_changing_any_one_token_changes_its_block_and_all_later_ones_only() -> None:
    for position in range(8):
        changed = TOKENS.copy()
        changed[position] ^= 1
        hashes = block_hashes(ROOT, changed, 4)
        same = [a == b for a, b in zip(hashes, BLOCKS, strict=True)]
        assert same == ([False, False] if position < 4 else [True, False])


def test_an_array_view_with_strides_hashes_like_its_copy() -> None:
    doubled = np.repeat(TOKENS, 2)
    assert block_hashes(ROOT, doubled[::2], 4) == BLOCKS


def test_token_ids_that_a_cast_could_cut_are_refused() -> None:
    with pytest.raises(TypeError):
        block_hashes(ROOT, TOKENS.astype(np.int64), 4)


@pytest.mark.parametrize("end", [-1, 11])
def test_an_end_outside_the_tokens_is_refused(end: int) -> None:
    with pytest.raises(AssertionError, match="outside"):
        chain_hash(ROOT, TOKENS, 4, end)
