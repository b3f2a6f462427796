"""What the sampling fields say about the end of a choice."""

from __future__ import annotations

from kvferry.wire.sampling import Sampling

EOS = frozenset({0})


def test_nothing_that_ends_a_choice_may_be_drawn_before_min_tokens() -> None:
    sampling = Sampling(min_tokens=2, stop_token_ids=(7,), banned=(9,))
    assert [sampling.banned_at(index, EOS) for index in range(4)] == [(9, 0, 7), (9, 0, 7), (9,), (9,)]


def test_where_eos_ends_nothing_it_may_always_be_drawn() -> None:
    sampling = Sampling(min_tokens=2, ignore_eos=True, stop_token_ids=(7,))
    assert [sampling.banned_at(index, EOS) for index in (1, 2)] == [(7,), ()]


def test_a_choice_ends_with_eos_unless_that_is_ignored_and_with_its_stop_tokens() -> None:
    sampling = Sampling(stop_token_ids=(7,))
    assert [token for token in range(9) if sampling.is_end(token, EOS)] == [0, 7]
    ignoring = Sampling(ignore_eos=True, stop_token_ids=(7,))
    assert [token for token in range(9) if ignoring.is_end(token, EOS)] == [7]
