"""Log-probabilities survive their columns, and columns that don't fit are refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import MalformedMessage
from kvferry.wire.fields import pack_tokens
from kvferry.wire.logprobs import TokenLogprobs, pack_logprobs, unpack_logprobs
from kvferry.wire.sampling import MAX_LOGPROBS
from kvferry.wire.tokens import LogprobColumns

floats = st.floats(-(2.0**99), 0, width=32)
token_ids = st.integers(0, (1 << 32) - 1)


@st.composite
def found(draw: st.DrawFn) -> TokenLogprobs:
    count = draw(st.integers(0, MAX_LOGPROBS))
    tokens = draw(st.lists(token_ids, min_size=count, max_size=count))
    return TokenLogprobs(draw(floats), tuple(tokens), tuple(draw(st.lists(floats, min_size=count, max_size=count))))


@given(st.dictionaries(st.integers(0, 99), found(), min_size=1, max_size=8))
def test_what_is_packed_comes_back(rows: dict[int, TokenLogprobs]) -> None:
    columns = pack_logprobs(sorted(rows.items()))
    assert columns is not None
    assert unpack_logprobs(columns, 100) == sorted(rows.items())


def test_no_rows_need_no_columns() -> None:
    assert pack_logprobs([]) is None


GOOD = pack_logprobs([(1, TokenLogprobs(-1.0, (5, 6), (-1.0, -2.0))), (3, TokenLogprobs(-0.5, (), ()))])
assert GOOD is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": pack_tokens([1, 1])}, {"rows": pack_tokens([3, 1])}, {"rows": pack_tokens([1, 4])},
        {"rows": pack_tokens([1])}, {"rows": b"123"}, {"counts": pack_tokens([2])}, {"counts": pack_tokens([1, 0])},
        {"counts": pack_tokens([MAX_LOGPROBS + 1, 0])}, {"counts": pack_tokens([(1 << 32) - 1, 3])},
        {"top_tokens": pack_tokens([5])}, {"top_tokens": b"1"}, {"logprobs": np.zeros(3, "<f4").tobytes()},
        {"logprobs": np.zeros(5, "<f4").tobytes()}, {"logprobs": b"12"},
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_malformed(fields: dict[str, bytes]) -> None:
    assert isinstance(GOOD, LogprobColumns)
    assert len(unpack_logprobs(GOOD, 4)) == 2
    with pytest.raises(MalformedMessage):
        unpack_logprobs(msgspec.structs.replace(GOOD, **fields), 4)
