"""Placing is a pure function of a snapshot: these are its rules."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.kv.events import pack_keys
from kvferry.wire.beats import Load
from kvferry.wire.cache_news import CacheEvents
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry_gateway.placement.decision import Decision, Hopeless, Placed, Request
from kvferry_gateway.placement.pairing import NoWorker, OtherNumerics, TooLong, numerics_of
from kvferry_gateway.placement.prediction import Snapshot
from kvferry_gateway.placement.prefix_index import index_keys
from kvferry_gateway.placement.routing import place
from kvferry_gateway.placement.targets import Targets

BLOCK = 10
NEVER_LOCAL = Targets(prefill_on_decode=False)


def number(name: str) -> int:
    return int.from_bytes(name.encode(), "little")


class World:
    """A snapshot with workers by name: p… prefill, d… decode."""

    def __init__(self, *names: str, targets: Targets = NEVER_LOCAL) -> None:
        self.snapshot = Snapshot.empty(targets)
        for name in names:
            self.add(name)

    def add(self, name: str, *, load: dict[str, Any] | None = None, state: Any = "ready", **record: Any) -> None:
        fields: dict[str, Any] = {
            "role": "prefill" if name[0] == "p" else "decode", "name": name, "incarnation": number(name), "pid": 1,
            "subject": name, "model": "m", "transport": "tcp", "address": WorkerAddress(number(name), ("a",)),
            "kv_format_id": "f", "numerics_id": "n", "max_model_len": 1000, "block_size": BLOCK, "num_blocks": 100,
            "kv_token_bytes": 1000,
        }  # fmt: skip
        made = WorkerRecord(**(fields | record))
        self.snapshot.roster.add(made, self.snapshot.index.attach(made.incarnation, name, made.num_blocks))
        self.load(name, state=state, **(load or {}))

    def load(self, name: str, *, state: Any = "ready", now: float = 0.0, **load: Any) -> None:
        fields = {"free_blocks": 100, "prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01} | load
        self.snapshot.roster.observe(number(name), Load(**fields), state, now)

    def cache(self, name: str, prompt: int, num_blocks: int) -> None:
        hashes = chain(prompt)[:num_blocks]
        self.snapshot.index.apply(CacheEvents(number(name), 1, pack_keys(hashes)))

    def place(self, num_tokens: int = 100, **fields: Any) -> Decision:
        fields = {"num_tokens": num_tokens, "max_total": num_tokens + 50} | fields
        return place(Request(**fields), self.snapshot, 0.0)


def chain(prompt: int) -> list[bytes]:
    return [hashlib.sha256(f"{prompt} {i}".encode()).digest()[:16] for i in range(50)]


def keys(prompt: int, num_blocks: int) -> tuple[int, ...]:
    return tuple(index_keys(pack_keys(chain(prompt)[:num_blocks])))


def names(decision: Decision) -> tuple[str, ...]:
    assert isinstance(decision, Placed), decision
    return tuple(worker.name for worker in (decision.prefill, decision.decode) if worker is not None)


def test_nobody_there_is_no_worker() -> None:
    assert World().place() == NoWorker()
    assert World("p0").place() == NoWorker(), "prefill alone can't serve"


def test_a_decode_worker_alone_does_both() -> None:
    decision = World("d0").place()
    assert names(decision) == ("d0",)
    assert isinstance(decision, Placed)
    assert decision.reason.why == "no_prefill_worker"


def test_a_short_prompt_is_prefilled_on_decode() -> None:
    world = World("p0", "d0")
    assert names(world.place(31, local_prefill_threshold=32)) == ("d0",)
    assert names(world.place(32, local_prefill_threshold=32)) == ("p0", "d0")


def test_the_shortest_queue_gets_it_where_nothing_is_cached() -> None:
    world = World("p0", "p1", "d0")
    world.load("p0", waiting_tokens=500)
    decision = world.place()
    assert names(decision) == ("p1", "d0")
    assert isinstance(decision, Placed)
    assert decision.reason.why == "least_work"
    assert decision.reason.ttft_s == pytest.approx(0.1, rel=0.1)


def test_a_cached_prefix_is_worth_a_queue_of_up_to_what_it_saves() -> None:
    world = World("p0", "p1", "d0")
    world.cache("p0", 1, 40)
    world.load("p0", waiting_tokens=200)
    decision = world.place(500, keys=keys(1, 50))
    assert names(decision) == ("p0", "d0")
    assert isinstance(decision, Placed)
    assert (decision.reason.why, decision.reason.cached_tokens) == ("cached_prefix", 400)
    assert decision.reason.queue_s == pytest.approx(0.2)
    assert decision.reason.prefill_s == pytest.approx(0.1)
    world.load("p0", waiting_tokens=600)
    assert names(world.place(500, keys=keys(1, 50))) == ("p1", "d0")


def test_a_cached_prefix_saves_more_than_its_own_seconds_where_others_wait() -> None:
    world = World("p0", "p1", "d0")
    world.cache("p0", 1, 40)
    for name, queued in (("p0", 1000), ("p1", 550)):
        world.load(name, waiting_tokens=queued)
    assert names(world.place(500, keys=keys(1, 50))) == ("p1", "d0")
    for name, queued in (("p0", 1000), ("p1", 550)):
        world.load(name, waiting_tokens=queued, num_waiting=4)
    assert names(world.place(500, keys=keys(1, 50))) == ("p0", "d0")


def test_a_prompt_that_is_cached_to_the_end_still_computes_its_last_token() -> None:
    world = World("p0", "d0")
    world.cache("p0", 1, 10)
    decision = world.place(100, keys=keys(1, 10))
    assert isinstance(decision, Placed)
    assert decision.reason.cached_tokens == 99


def test_its_own_measured_rate_counts_once_it_stands_out() -> None:
    world = World("p0", "p1", "d0")
    for beat in range(100):
        world.load("p0", prefill_tokens_per_s=1000.0, now=beat * 0.25)
        world.load("p1", prefill_tokens_per_s=4000.0, waiting_tokens=300, now=beat * 0.25)
    assert names(world.place(1000 - 50)) == ("p1", "d0")


def test_a_rate_that_differs_by_less_than_it_varies_decides_nothing() -> None:
    world = World("p0", "p1", "d0")
    for beat in range(200):
        world.load("p0", prefill_tokens_per_s=1000.0 + 300 * (beat % 2), now=beat * 0.25)
        world.load("p1", prefill_tokens_per_s=1100.0 + 300 * (beat % 2), waiting_tokens=40, now=beat * 0.25)
    assert names(world.place(900)) == ("p0", "d0"), "p1 looks faster, and has a queue"


def test_the_link_s_own_rate_counts() -> None:
    world = World("p0", "p1", "d0")
    for _ in range(3):
        world.snapshot.links.observe(number("p0"), number("d0"), 1e6, 1.0)  # 1 MB/s: 0.1 s for 100 tokens
        world.snapshot.links.observe(number("p1"), number("d0"), 1e6, 0.001)
    assert names(world.place()) == ("p1", "d0")


def test_the_decode_worker_whose_streams_suffer_least_gets_it() -> None:
    world = World("p0", "d0", "d1")
    world.load("d0", num_running=8, decode_step_s=0.045)
    world.load("d1", num_running=2, decode_step_s=0.02)
    assert names(world.place()) == ("p0", "d1")


def test_a_decode_worker_without_blocks_comes_last_but_is_taken() -> None:
    world = World("p0", "d0", "d1")
    world.load("d0", free_blocks=3)
    world.load("d1", num_running=20, decode_step_s=0.04)
    assert names(world.place()) == ("p0", "d1")
    only = World("p0", "d0")
    only.load("d0", free_blocks=3)
    assert names(only.place()) == ("p0", "d0")


def test_what_was_placed_since_the_last_heartbeat_counts() -> None:
    world = World("p0", "p1", "d0", "d1")
    world.snapshot.roster.placed(number("p0"), 0.0, 300)
    world.snapshot.roster.placed(number("d0"), 0.0, 0, 99)
    assert names(world.place()) == ("p1", "d1")
    world.load("p0")
    world.load("p1", waiting_tokens=300)
    assert names(world.place()) == ("p0", "d1"), "the heartbeat knows by now"


def test_a_queue_drains_between_heartbeats() -> None:
    world = World("p0", "p1", "d0")
    world.load("p0", waiting_tokens=200, now=0.0)
    world.load("p1", waiting_tokens=100, now=0.2)
    request = Request(100, 150)
    assert names(place(request, world.snapshot, 0.2)) == ("p0", "d0")


def test_prefill_moves_to_decode_where_it_is_faster_and_hurts_nobody() -> None:
    def world(**decode: Any) -> World:
        made = World("p0", "d0", targets=Targets(itl_s=0.05))
        made.load("p0", waiting_tokens=400)
        made.load("d0", **decode)
        return made

    decision = world().place(30)
    assert names(decision) == ("d0",)
    assert isinstance(decision, Placed)
    assert decision.reason.why == "faster_on_decode"
    running = {"num_running": 2, "decode_step_s": 0.01}
    assert names(world(**running).place(10)) == ("d0",), "10 ms more in one step"
    assert names(world(**running).place(60)) == ("p0", "d0"), "60 ms would break the target of running streams"
    assert names(world().place(700)) == ("p0", "d0"), "no stream runs, but one that comes would wait too long"
    idle = World("p0", "d0", targets=Targets(prefill_on_decode=False))
    idle.load("p0", waiting_tokens=400)
    assert names(idle.place(30)) == ("p0", "d0")


def test_a_follow_up_turn_is_prefilled_where_its_cache_lies() -> None:
    world = World("p0", "d0", "d1", targets=Targets())
    world.cache("d1", 1, 48)
    assert names(world.place(500, keys=keys(1, 50))) == ("d1",)


def test_workers_pair_only_with_the_same_kv_format() -> None:
    world = World("d0")
    world.add("p1", kv_format_id="g")
    assert names(world.place()) == ("d0",)
    world.add("p0")
    assert names(world.place()) == ("p0", "d0")
    world.load("d0", num_running=9, decode_step_s=0.06)
    world.add("d1", kv_format_id="g")
    assert names(world.place()) == ("p1", "d1"), "the better group wins"


def test_an_exact_decode_worker_takes_only_kv_of_its_own_numerics() -> None:
    world = World("p0")
    world.add("p1", numerics_id="o", exact=True)
    world.add("d0", exact=True)
    assert names(world.place()) == ("d0",), "p0 computes fast, p1 on other numerics"
    world.add("p2", exact=True)
    assert names(world.place()) == ("p2", "d0")


def test_a_bound_unit_stays_on_its_numerics() -> None:
    world = World("p0", "d0")
    world.add("d1", exact=True)
    world.add("p1", exact=True)
    assert names(world.place(bound_to="n")) == ("p1", "d1")
    assert world.place(bound_to="o") == OtherNumerics("o")


@pytest.mark.parametrize("state", ["loading", "draining", "wedged"])
def test_workers_that_are_not_ready_get_nothing(state: str) -> None:
    world = World("p0", "d0")
    world.load("d0", state=state)
    assert world.place() == NoWorker()


def test_full_prefill_workers_do_not_push_their_work_onto_decode() -> None:
    world = World("p0", "d0", targets=Targets())
    assert world.place(full={number("p0")}) == NoWorker()
    pair = World("p0", "p1", "d0")
    assert names(pair.place(full={number("p0")})) == ("p1", "d0")
    assert World("p0", "d0").place(full={number("d0")}) == NoWorker()


def test_prefill_workers_that_cannot_be_reached_are_as_if_they_were_not_there() -> None:
    assert names(World("p0", "d0").place(unusable={number("p0")})) == ("d0",)


def test_a_worker_that_is_gone_gets_nothing_and_its_row_is_used_again() -> None:
    world = World("p0", "p1", "d0")
    world.snapshot.roster.remove(number("p1"))
    world.load("p0", waiting_tokens=900)
    assert names(world.place()) == ("p0", "d0")
    world.add("p2")
    assert names(world.place()) == ("p2", "d0")


def test_what_fits_no_worker_is_too_long_and_names_the_largest() -> None:
    world = World("p0")
    world.add("d0", num_blocks=10)
    assert world.place(100, max_total=101) == TooLong(100)
    world.add("d1")
    assert names(world.place(100, max_total=101)) == ("p0", "d1")
    assert world.place(100, max_total=101, full={number("d1")}) == NoWorker(), "full, not too long"


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    world = World("p0", "d0")
    world.load("p0", waiting_tokens=100_000)
    decision = world.place(deadline_s=5.0)
    assert isinstance(decision, Hopeless)
    assert decision.expected_s == pytest.approx(100.1, rel=0.01)
    assert decision.retry_after > 90
    assert names(world.place(deadline_s=600.0)) == ("p0", "d0")
    assert isinstance(world.place(deadline_s=0.0), Hopeless)


def test_a_queue_is_bounded_by_priority_and_urgent_requests_see_only_what_is_ahead_of_them() -> None:
    world = World("p0", "d0", targets=Targets(max_queue_s=1.0, prefill_on_decode=False))
    world.load("p0", waiting_tokens=800)
    assert names(world.place()) == ("p0", "d0")
    assert isinstance(world.place(priority=5), Hopeless), "background waits half as long"
    world.load("p0", waiting_tokens=2000)
    assert isinstance(world.place(), Hopeless)
    assert names(world.place(admitted=True)) == ("p0", "d0"), "a stream that lost its workers is not refused"
    assert names(world.place(priority=-1)) == ("p0", "d0"), "urgent waits four times as long"
    roster = world.snapshot.roster
    load = Load(waiting_tokens=6000, prefill_tokens_per_s=1000.0, queued_tokens=(0, 500, 5500))
    roster.observe(number("p0"), load, "ready", 0.0)
    decision = world.place()
    assert isinstance(decision, Placed)
    assert decision.reason.queue_s == pytest.approx(0.5)
    roster.placed(number("p0"), 0.0, 300, priority=5)
    assert isinstance(again := world.place(), Placed)
    assert again.reason.queue_s == pytest.approx(0.5), "what was placed behind it is not ahead of it"


def test_many_tickets_spread_over_equal_workers_and_one_ticket_stays() -> None:
    world = World(*(f"p{i:02}" for i in range(40)), *(f"d{i:02}" for i in range(40)))
    chosen = Counter(names(world.place(seed=seed * 0x9E3779B97F4A7C15)) for seed in range(400))
    for side in (0, 1):
        loads = Counter(pair[side] for pair in chosen.elements())
        assert len(loads) >= 38
        assert max(loads.values()) <= 30, "ten each would be even"
    assert names(world.place(seed=5)) == names(world.place(seed=5))


def test_breaking_ties_costs_at_most_what_it_may() -> None:
    world = World(*(f"p{i:02}" for i in range(40)), *(f"d{i:02}" for i in range(40)))
    for i in range(40):
        world.load(f"p{i:02}", waiting_tokens=i)
    for seed in range(100):
        decision = world.place(seed=seed)
        assert isinstance(decision, Placed)
        assert decision.cost <= decision.lowest_cost * 1.01 + 0.002


workers = st.lists(
    st.tuples(
        st.sampled_from("ppd"), st.integers(0, 2000), st.integers(0, 12), st.integers(0, 100), st.integers(0, 30)
    ),
    max_size=30,
)


@settings(max_examples=100)
@given(workers, st.integers(1, 500), st.sets(st.integers(0, 29)), st.integers(0, 1 << 64), st.booleans())
def test_a_decision_is_allowed_pure_and_near_the_best_of_all_pairs(
    specs: list[tuple[str, int, int, int, int]], num_tokens: int, refused: set[int], seed: int, local: bool
) -> None:
    world = World(targets=Targets(prefill_on_decode=local))
    listed = [f"{role}{i}" for i, (role, *_) in enumerate(specs)]
    for name, (_, waiting, running, free, cached) in zip(listed, specs, strict=True):
        world.add(name, load={"waiting_tokens": waiting, "num_running": running, "free_blocks": free})
        world.cache(name, 1, cached)
    full = {number(listed[i]) for i in refused if i < len(listed)}
    request = Request(num_tokens, num_tokens + 50, seed=seed, keys=keys(1, min(50, num_tokens // BLOCK)), full=full)
    before = copy.deepcopy(world.snapshot.roster.queued_tokens)
    decision = place(request, world.snapshot, 0.0)
    assert decision == place(request, world.snapshot, 0.0)
    assert (world.snapshot.roster.queued_tokens == before).all()
    able = {role: [n for n in listed if n[0] == role and number(n) not in full] for role in "pd"}
    if isinstance(decision, NoWorker):
        assert not able["d"] or (not able["p"] and any(name[0] == "p" for name in listed))
        return
    assert isinstance(decision, Placed)
    assert decision.decode.name in able["d"]
    assert decision.prefill is None or decision.prefill.name in able["p"]
    narrow, everything = place(request, world.snapshot, 0.0, width=4), place(request, world.snapshot, 0.0, width=1000)
    assert isinstance(narrow, Placed)
    assert isinstance(everything, Placed)
    assert narrow.cost <= everything.lowest_cost * 1.02 + 0.004, "four of each are enough when links are alike"


worker_kinds = st.tuples(
    st.sampled_from("pd"), st.sampled_from("ab"), st.booleans(), st.integers(0, 5), st.integers(0, 10)
)


@settings(max_examples=200)
@given(st.lists(worker_kinds, max_size=8), st.sampled_from([None, "a", "b"]), st.sets(st.integers(0, 7)), st.booleans())
def test_no_decision_mixes_numerics_where_exactness_is_promised(
    specs: list[tuple[str, str, bool, int, int]], bound_to: str | None, refused: set[int], local: bool
) -> None:
    world = World(targets=Targets(prefill_on_decode=local))
    listed = [f"{role}{i}" for i, (role, *_) in enumerate(specs)]
    for name, (_, numerics, exact, running, cached) in zip(listed, specs, strict=True):
        world.add(name, load={"num_running": running}, numerics_id=numerics, exact=exact)
        world.cache(name, 1, cached)
    full = {number(listed[i]) for i in refused if i < len(listed)}
    decoders = [record for record in world.snapshot.roster.records if record and record.role == "decode"]
    match world.place(keys=keys(1, 10), bound_to=bound_to, full=full):
        case Placed(prefill, decode):
            assert bound_to in (None, numerics_of(decode))
            if prefill is not None and decode.exact:
                assert prefill.exact
                assert prefill.numerics_id == decode.numerics_id
        case OtherNumerics(numerics_id):
            assert numerics_id == bound_to
            assert decoders
            assert not any(numerics_of(decode) == bound_to for decode in decoders)
        case NoWorker():
            pass
        case other:
            raise AssertionError(f"all have room and nobody waits: {other}")


@pytest.mark.parametrize("field", ["ttft_s", "itl_s", "max_queue_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_target_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Targets(**{field: value})
