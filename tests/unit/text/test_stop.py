"""Stop strings, against the plain definition of what they do."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.text.stop import MAX_STOP_CHARS, MAX_STOP_STRINGS, StopMatcher

STOPS = st.lists(st.text("ab✈", min_size=1, max_size=4), max_size=5)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Cut at the stop string that is complete first; of two that end together, the longer one."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        ready, stopped = matcher.push(piece)
        shown += ready
        if stopped:
            return shown, matcher.matched
    return shown + matcher.finish(), matcher.matched


@given(text=st.text("abc✈", max_size=40), stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=10))
def test_any_cutting_of_the_text_gives_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    assert run(pieces, stops) == expected(text, stops)


@given(text=st.text("ab", max_size=30), stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for char in text:
        ready, stopped = matcher.push(char)
        shown += ready
        if stopped:
            return
        read = text[: len(shown) + len(matcher._held)]
        tails = [read[-n:] for n in range(1, len(read) + 1) if any(s.startswith(read[-n:]) for s in stops)]
        assert matcher._held == max(tails, key=len, default="")


def test_a_stop_string_in_pieces_is_found_and_left_out() -> None:
    assert run(["the ", "E", "N", "D", " of"], ["END"]) == ("the ", "END")


def test_a_false_start_is_shown_once_it_is_refuted() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("xEN") == ("x", False)
    assert matcher.push("ENT") == ("ENENT", False)
    assert matcher.finish() == ""


def test_a_tail_that_never_became_a_stop_string_is_shown_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.finish() == "EN"


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("a\n\nb") == ("a", True)
    assert matcher.push("c") == ("", True)
    assert matcher.finish() == ""


def test_without_stop_strings_text_passes_through() -> None:
    assert StopMatcher([]).push("all of it") == ("all of it", False)


def test_the_longest_allowed_stop_strings_are_matched() -> None:
    stops = [chr(0x4E00 + i) + "a" * (MAX_STOP_CHARS - 1) for i in range(MAX_STOP_STRINGS)]
    assert run(["x" + stops[-1][:-1], "a" + "z"], stops) == ("x", stops[-1])


@pytest.mark.parametrize("stops", [[""], ["a" * (MAX_STOP_CHARS + 1)], ["a"] * (MAX_STOP_STRINGS + 1)])
def test_stop_strings_over_the_limits_are_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="stop string"):
        StopMatcher(stops)
