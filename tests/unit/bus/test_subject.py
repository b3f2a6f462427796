"""Subjects and patterns. What real NATS makes of them is tested by the bus contract."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.bus.base import InvalidSubject
from kvferry.bus.subject import check_pattern, check_subject, matches

token = st.text(st.characters(whitelist_categories=("L", "N")), min_size=1, max_size=8)
subjects = st.lists(token, min_size=1, max_size=5).map(".".join)


@given(subjects)
def test_a_plain_subject_is_valid_and_matches_itself_and_everything(subject: str) -> None:
    check_subject(subject)
    check_pattern(subject)
    assert matches(subject, subject)
    assert matches(">", subject)
    assert not matches(subject, subject + ".more")
    assert not matches(subject + ".>", subject)
    assert matches(subject + ".>", subject + ".more.and.more")


@given(st.lists(token, min_size=1, max_size=5), st.data())
def test_a_star_stands_for_exactly_one_token(tokens: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    pattern = ".".join([*tokens[:place], "*", *tokens[place + 1 :]])
    check_pattern(pattern)
    with pytest.raises(InvalidSubject):
        check_subject(pattern)
    assert matches(pattern, ".".join(tokens))
    assert not matches(pattern, ".".join([*tokens, "x"]))


@given(st.text(max_size=40))
def test_any_text_is_either_valid_or_an_invalid_subject(text: str) -> None:
    try:
        check_subject(text)
    except InvalidSubject:
        return
    assert not set(text) & set(" \r\n\t*>")
