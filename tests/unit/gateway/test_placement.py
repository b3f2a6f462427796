"""Placement is a pure function: these are its rules."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvferry.wire.messages import Load, WorkerAddress, WorkerRecord
from kvferry_gateway.placement import (
    Local,
    NoWorker,
    OtherNumerics,
    Pair,
    Placement,
    TooLong,
    WorkerView,
    numerics_of,
    place,
)


def view(
    role: str, name: str, *, view: dict[str, Any] | None = None, load: dict[str, Any] | None = None, **record: Any
) -> WorkerView:
    incarnation = hash_of(name)
    fields: dict[str, Any] = {
        "role": role, "name": name, "incarnation": incarnation, "pid": 1, "subject": name, "model": "m",
        "transport": "tcp", "address": WorkerAddress(incarnation, ("a",)), "kv_format_id": "f", "numerics_id": "n",
        "max_model_len": 1000, "block_size": 10, "num_blocks": 100, "kv_token_bytes": 1,
    }  # fmt: skip
    loaded = Load(**({"free_blocks": 100} | (load or {})))
    return WorkerView(WorkerRecord(**(fields | record)), loaded, **({"state": "ready"} | (view or {})))


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little")


def request(num_tokens: int = 100, **fields: Any) -> Placement:
    return Placement(
        **(
            {"model": "m", "num_tokens": num_tokens, "max_total": num_tokens + 50, "local_prefill_threshold": 0}
            | fields
        )
    )


def names(decision: Any) -> tuple[str, ...]:
    match decision:
        case Pair(prefill, decode):
            return (prefill.record.name, decode.record.name)
        case Local(decode):
            return (decode.record.name,)
    raise AssertionError(decision)


P0, P1, D0, D1 = view("prefill", "p0"), view("prefill", "p1"), view("decode", "d0"), view("decode", "d1")


def test_nobody_there_is_no_worker() -> None:
    assert place(request(), ()) == NoWorker()
    assert place(request(), (P0,)) == NoWorker(), "prefill alone can't serve"


def test_a_decode_worker_alone_does_both() -> None:
    assert names(place(request(), (D0,))) == ("d0",)


def test_a_short_prompt_is_prefilled_on_decode() -> None:
    assert names(place(request(31, local_prefill_threshold=32), (P0, D0))) == ("d0",)
    assert names(place(request(32, local_prefill_threshold=32), (P0, D0))) == ("p0", "d0")


def test_the_prefill_worker_that_is_done_first_gets_it() -> None:
    busy = view("prefill", "a", load={"waiting_tokens": 500})
    assert names(place(request(), (busy, P0, D0))) == ("p0", "d0")
    fast = view("prefill", "z", load={"waiting_tokens": 500, "prefill_tokens_per_s": 20_000.0})
    assert names(place(request(), (fast, P0, D0))) == ("z", "d0"), "its own measured rate counts"


def test_the_decode_worker_with_the_least_to_do_gets_it() -> None:
    busy = view("decode", "a", load={"num_running": 4})
    assert names(place(request(), (busy, D0))) == ("d0",)
    slow = view("decode", "a", load={"decode_step_s": 0.1})
    assert names(place(request(), (slow, D0))) == ("d0",)


def test_what_was_placed_since_the_last_heartbeat_counts() -> None:
    assert names(place(request(), (view("decode", "a", view={"placed_requests": 1}), D0))) == ("d0",)
    placed = view("prefill", "a", view={"placed_tokens": 100})
    assert names(place(request(), (placed, P0, D0))) == ("p0", "d0")


def test_a_worker_without_blocks_comes_last_but_is_taken() -> None:
    full = view("decode", "a", load={"free_blocks": 3})
    busy = view("decode", "b", load={"num_running": 50})
    assert names(place(request(), (full, busy))) == ("b",)
    assert names(place(request(), (full,))) == ("a",)


def test_ties_go_to_the_least_recently_placed_and_then_by_name() -> None:
    assert names(place(request(), (P1, P0, D1, D0))) == ("p0", "d0")
    recent = view("decode", "d0", view={"last_placed": 2})
    older = view("decode", "d1", view={"last_placed": 1})
    assert names(place(request(), (recent, older))) == ("d1",)


def test_workers_pair_only_with_the_same_kv_format_and_model() -> None:
    other = view("prefill", "a", kv_format_id="g")
    assert names(place(request(), (other, P0, D0))) == ("p0", "d0")
    assert names(place(request(), (other, D0))) == ("d0",), "nobody it could pair with: it prefills itself"
    assert names(place(request(), (view("prefill", "a", model="x"), D0))) == ("d0",)
    cheaper = view("decode", "e0", kv_format_id="g")
    loaded = view("decode", "d0", load={"num_running": 9})
    assert names(place(request(), (P0, other, loaded, cheaper))) == ("a", "e0"), "the better group wins"


def test_workers_that_are_not_ready_get_nothing() -> None:
    for state in ("loading", "draining", "wedged"):
        assert place(request(), (view("decode", "a", view={"state": state}),)) == NoWorker()


def test_full_prefill_workers_do_not_push_their_work_onto_decode() -> None:
    assert place(request(full={P0.incarnation}), (P0, D0)) == NoWorker()
    assert names(place(request(full={P0.incarnation}), (P0, P1, D0))) == ("p1", "d0")


def test_prefill_workers_that_cannot_be_reached_are_as_if_they_were_not_there() -> None:
    assert names(place(request(unusable={P0.incarnation}), (P0, D0))) == ("d0",)


def test_what_fits_no_worker_is_too_long_and_names_the_largest() -> None:
    small = view("decode", "a", num_blocks=10)
    assert place(request(100, max_total=101), (P0, small)) == TooLong(100)
    assert names(place(request(100, max_total=101), (P0, small, D0))) == ("p0", "d0"), "another one holds it"
    assert place(request(100, max_total=101, full={D0.incarnation}), (P0, small, D0)) == NoWorker(), (
        "full, not too long"
    )
    tiny = view("prefill", "p0", num_blocks=5)
    assert names(place(request(100), (tiny, D0))) == ("d0",), "a prefill worker that can't hold the prompt is no help"


# -- exactness -------------------------------------------------------------------------------------------------


def exact(role: str, name: str, numerics: str, **more: Any) -> WorkerView:
    return view(role, name, exact=True, numerics_id=numerics, **more)


def test_exact_workers_pair_only_with_those_of_their_own_numerics() -> None:
    pa, pb, da, db = (exact(role, f"{role[0]}-{n}", n) for role in ("prefill", "decode") for n in ("a", "b"))
    busy = {"waiting_tokens": 900}
    assert names(place(request(), (exact("prefill", "p", "a", load=busy), pb, da))) == ("p", "d-a"), "b is idle"
    assert names(place(request(), (pb, da))) == ("d-a",), "nobody whose KV it takes: it prefills itself"
    loaded = exact("decode", "d-a", "a", load={"num_running": 9})
    assert names(place(request(), (pa, pb, loaded, db))) == ("p-b", "d-b"), "the better group wins"


def test_an_exact_worker_takes_no_kv_of_one_that_is_not_and_a_fast_one_takes_any() -> None:
    same_but_fast = view("prefill", "p", numerics_id="a")
    assert names(place(request(), (same_but_fast, exact("decode", "d", "a")))) == ("d",)
    assert names(place(request(), (exact("prefill", "p", "b"), view("decode", "d", numerics_id="a")))) == ("p", "d")
    assert names(place(request(), (view("prefill", "p", numerics_id="b"), D0))) == ("p", "d0")


def test_a_full_prefill_worker_of_other_numerics_does_not_keep_a_decode_worker_from_prefilling() -> None:
    other = exact("prefill", "p", "b")
    workers = (other, exact("prefill", "q", "c"), exact("decode", "d", "a"))
    assert names(place(request(full={other.incarnation}), workers)) == ("d",)
    assert place(request(full={other.incarnation}), (other, exact("decode", "d", "b"))) == NoWorker()


def test_a_unit_that_began_on_one_numerics_goes_to_no_other() -> None:
    idle = exact("decode", "d-b", "b")
    loaded = exact("decode", "d-a", "a", load={"num_running": 60, "free_blocks": 0})
    pair_b = exact("prefill", "p-b", "b")
    assert names(place(request(), (pair_b, idle, loaded))) == ("p-b", "d-b")
    assert names(place(request(bound_to="a"), (pair_b, idle, loaded))) == ("d-a",), "however busy it is"
    assert place(request(bound_to="a"), (pair_b, idle)) == OtherNumerics("a")
    fast = view("decode", "d-f", numerics_id="a")
    assert place(request(bound_to="a"), (pair_b, fast)) == OtherNumerics("a"), "a name alone promises nothing"
    assert place(request(bound_to="a"), ()) == NoWorker(), "nobody at all is another case"
    assert place(request(bound_to="a", full={loaded.incarnation}), (idle, loaded)) == NoWorker(), "full, not gone"
    assert place(request(bound_to="a", unusable={loaded.incarnation}), (idle, loaded)) == OtherNumerics("a")


def test_only_an_exact_decode_worker_binds() -> None:
    assert numerics_of(exact("decode", "d", "a").record) == "a"
    assert numerics_of(view("decode", "d", numerics_id="a").record) is None


worker_kinds = st.tuples(
    st.sampled_from(["prefill", "decode"]), st.sampled_from("ab"), st.booleans(), st.integers(0, 5)
)


@given(st.lists(worker_kinds, max_size=8), st.sampled_from([None, "a", "b"]), st.sets(st.integers(0, 7)))
def test_no_decision_mixes_numerics_where_exactness_is_promised(
    specs: list[tuple[str, str, bool, int]], bound_to: str | None, refused: set[int]
) -> None:
    views = tuple(
        view(role, f"w{i}", numerics_id=numerics, exact=is_exact, load={"num_running": running})
        for i, (role, numerics, is_exact, running) in enumerate(specs)
    )
    full = {views[i].incarnation for i in refused if i < len(views)}
    match place(request(bound_to=bound_to, full=full), views):
        case Pair(prefill, decode):
            if decode.record.exact:
                assert prefill.record.exact
                assert prefill.record.numerics_id == decode.record.numerics_id
            assert bound_to in (None, numerics_of(decode.record))
        case Local(decode):
            assert bound_to in (None, numerics_of(decode.record))
        case OtherNumerics(numerics_id):
            assert numerics_id == bound_to
            decoders = [v for v in views if v.record.role == "decode"]
            assert decoders
            assert not any(numerics_of(v.record) == bound_to for v in decoders)
        case TooLong():
            raise AssertionError("all have the same room")


@given(
    st.lists(st.tuples(st.sampled_from(["prefill", "decode"]), st.integers(0, 5), st.integers(0, 100)), max_size=8),
    st.integers(1, 900),
    st.sets(st.integers(0, 7)),
)
def test_a_decision_names_only_workers_that_may_take_it(
    specs: list[tuple[str, int, int]], num_tokens: int, refused: set[int]
) -> None:
    views = tuple(
        view(role, f"w{i}", load={"num_running": running, "free_blocks": free})
        for i, (role, running, free) in enumerate(specs)
    )
    full = {views[i].incarnation for i in refused if i < len(views)}
    decision = place(request(num_tokens, full=full), views)
    assert decision == place(request(num_tokens, full=full), views), "the same question has the same answer"
    able = [v for v in views if v.record.role == "decode" and v.incarnation not in full]
    match decision:
        case Pair(prefill, decode):
            assert (prefill.record.role, decode.record.role) == ("prefill", "decode")
            assert not {prefill.incarnation, decode.incarnation} & full
        case Local(decode):
            assert decode in able
            assert not any(v.record.role == "prefill" for v in views)
        case NoWorker():
            everyone_full = all(v.incarnation in full for v in views if v.record.role == "prefill")
            assert not able or (everyone_full and any(v.record.role == "prefill" for v in views))
        case TooLong():
            assert num_tokens + 50 > 1000
