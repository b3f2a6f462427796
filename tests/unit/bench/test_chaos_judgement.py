"""The chaos benchmark's own judgement: what it calls wrong, whom a fault has hit, and in which phase."""

from __future__ import annotations

from typing import Any

import pytest
from bench.books import violations
from bench.chaos_cases import Case, Right
from bench.chaos_clients import Asked, Outcome
from bench.chaos_faults import Fault
from bench.chaos_fleet import Place, places_on
from bench.tap import Attempt, Heard

from kvferry.wire.sampling import Sampling
from kvferry_local.bench.stream import Stream

RIGHT = Right("one two three", [1, 2, 3])
DECODE, PREFILL = 0xD, 0xF


def asked(outcome: Outcome, text: str, token_ids: list[int] | None, completion_tokens: int | None = None) -> Asked:
    """A request that came to this; without ids it did not ask for them."""
    one = Asked("chaos-0", Case("case-0", {"max_tokens": 3}, False), 1, token_ids is not None, None)
    told = len(token_ids) if completion_tokens is None and token_ids is not None else completion_tokens
    one.so_far = Stream(sent=1.0, text=text, token_ids=token_ids or [], usage={"completion_tokens": told})
    one.outcome = outcome
    one.judge(RIGHT)
    return one


@pytest.mark.parametrize("ids", [[1, 2, 3], None])
def test_what_an_undisturbed_run_gave_is_right(ids: list[int] | None) -> None:
    one = asked("right", "one two three", ids, 3)
    assert one.outcome == "right"
    assert one.admitted


@pytest.mark.parametrize(
    ("text", "ids", "told", "counts"),
    [
        ("one two", [1, 2], 2, (0, 1, 0)),
        ("one two", None, 2, (0, 1, 0)),
        ("one two three three", [1, 2, 3, 3], 4, (0, 0, 1)),
        ("one two four", [1, 2, 4], 3, (1, 0, 0)),
        ("one two four", None, 3, (1, 0, 0)),
        ("one two four", [1, 2, 3], 3, (1, 0, 0)),  # right ids, other text
        ("one two three", [1, 2, 3], 2, (1, 0, 0)),  # usage that says something else
    ],
)
def test_a_token_that_is_lost_doubled_or_another_one_is_wrong(
    text: str, ids: list[int] | None, told: int, counts: tuple[int, int, int]
) -> None:
    one = asked("right", text, ids, told)
    assert one.outcome == "wrong"
    assert (one.num_wrong, one.num_lost, one.num_doubled) == counts


@pytest.mark.parametrize("outcome", ["cancelled", "reset", "cut", "failed"])
def test_a_text_that_was_not_read_to_its_end_must_be_a_beginning_of_the_right_one(outcome: Outcome) -> None:
    assert asked(outcome, "one tw", []).outcome == outcome
    assert asked(outcome, "", []).outcome == outcome
    assert asked(outcome, "one to", []).outcome == "wrong"


def heard(*, accepted: bool = True, tokens: int = 0, attempt: int = 5) -> Heard:
    """A request on one pair of workers."""
    one = Attempt(attempt, bytes([attempt]) * 16, "kvferry.dev.gateway.gateway-0.00", 9, [])
    one.workers = {"prefill": PREFILL, "decode": DECODE}
    one.answers = {"a": 1.0, "b": 2.0} if accepted else {}
    one.tokens = dict(enumerate(range(tokens)))
    return Heard([1], Sampling(), 0, {attempt: one})


def books(*states: str, attempt: int = 5) -> dict[str, Any]:
    holdings = [{"ticket": (bytes([attempt]) * 16).hex(), "attempt": attempt, "state": state} for state in states]
    return {"holdings": holdings}


@pytest.mark.parametrize(
    ("role", "held", "tokens", "phase"),
    [
        ("prefill", (), 0, "queued"),
        ("prefill", ("reserved",), 0, "computing"),
        ("prefill", ("running",), 0, "computing"),
        ("prefill", ("held",), 1, "held"),
        ("prefill", (), 1, None),  # acknowledged: it needs this worker no more
        ("decode", (), 0, None),  # waits for its prefill worker
        ("decode", ("fetching",), 0, "fetching"),
        ("decode", ("running",), 4, "running"),
    ],
)
def test_the_ledger_and_the_bus_tell_which_phase_a_request_is_in(
    role: str, held: tuple[str, ...], tokens: int, phase: str | None
) -> None:
    row = {"role": role, "incarnation": f"{DECODE if role == 'decode' else PREFILL:016x}"}
    places = places_on(row, books(*held), {"r": heard(tokens=tokens)}, ["r"])
    assert places == ({} if phase is None else {"r": Place(phase, 5)})  # type: ignore[arg-type]


def test_a_request_elsewhere_or_not_yet_accepted_is_not_on_a_worker() -> None:
    row = {"role": "decode", "incarnation": f"{DECODE + 1:016x}"}
    assert places_on(row, books("running"), {"r": heard()}, ["r", "unheard"]) == {}
    row = {"role": "decode", "incarnation": f"{DECODE:016x}"}
    assert places_on(row, books("running"), {"r": heard(accepted=False)}, ["r"]) == {}


def test_a_fault_has_hit_whom_it_made_to_be_placed_again() -> None:
    hit, spared = heard(), heard()
    again = Attempt(8, bytes(16), "kvferry.dev.gateway.gateway-0.00", 10, [])
    again.workers, again.answers = {"decode": DECODE + 1}, {"c": 12.5}
    hit.attempts[8] = again
    place = Place("running", 5)
    fault = Fault("kill", "decode-0", 12.0, {"hit": place, "spared": place})
    requests = {"hit": hit, "spared": spared}
    assert fault.struck(requests) == {"hit": place}
    assert fault.new_pair_s(requests) == [0.5]


def test_books_at_rest_hold_nothing() -> None:
    rest = {"counts": {"free": 3, "cached": 1}, "num_blocks": 4, "slots": {"free": 2}, "holdings": [], "sequences": 0,
            "streams": 0}  # fmt: skip
    assert violations(rest) == []
    assert violations({**rest, "counts": {"free": 2, "cached": 1, "held": 1}})
    assert violations({**rest, "slots": {"free": 1, "busy": 1}})
    assert violations({**rest, "streams": 1})
