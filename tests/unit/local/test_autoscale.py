"""What `kvferry autoscale` decides, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import KvferryError, SettingError
from kvferry.scaling import DecodeRules, DecodeScaling, PrefillRules, PrefillScaling
from kvferry_gateway.placement.targets import Targets
from kvferry_local.autoscale.autoscaler import Autoscaler
from kvferry_local.autoscale.decision import DecodeSignals, Patience, PrefillSignals, autoscale
from kvferry_local.autoscale.service import chosen, parsed
from kvferry_local.autoscale.signals import WINDOW_S, Watch, WorkerView
from kvferry_local.autoscale.target import CommandTarget, ScalingFailed

PREFILL = PrefillRules(max_replicas=20, utilisation=0.5, ttft_share=0.5, clear_s=10.0)
DECODE = DecodeRules(max_replicas=20, itl_share=0.8, kv_use=0.5)
TARGETS = Targets(ttft_s=2.0, itl_s=0.05)


def prefill(busy: float = 0.0, queued_s: float = 0.0, growth: float = 0.0, workers: int = 1) -> PrefillSignals:
    return PrefillSignals(busy, queued_s, growth, queued_s / workers, TARGETS.ttft_s)


def decode(
    streams: float = 0.0, tokens: float = 0.0, used_blocks: float = 0.0, base: float = 0.01, slope: float = 0.003
) -> DecodeSignals:
    return DecodeSignals(streams, tokens, base, slope, used_blocks, 100.0, TARGETS.itl_s, 64)


@pytest.mark.parametrize(
    ("signals", "wanted"),
    [
        (prefill(), 1),
        (prefill(busy=2.0), 4),  # half of the time
        (prefill(busy=2.1), 5),
        (prefill(busy=2.0, growth=-1.0), 4),
        (prefill(busy=2.0, growth=1.5), 7),  # all of them busy, and work for one and a half more arrives
        (prefill(busy=1.0, queued_s=30.0, workers=30), 2),  # 1 s of wait each: half of the target
        (prefill(busy=1.0, queued_s=30.0, workers=29), 4),  # one for what arrives, three to clear the rest in 10 s
        (prefill(queued_s=1e9), 20),
    ],
)
def test_prefill_is_wanted_for_what_arrives_and_for_queues_that_are_too_long(
    signals: PrefillSignals, wanted: int
) -> None:
    assert autoscale(signals, PREFILL) == wanted


@pytest.mark.parametrize(
    ("signals", "wanted"),
    [
        (decode(), 1),
        (decode(streams=10), 1),  # ten streams make a step of 40 ms, what the share of the target allows
        (decode(streams=11), 2),
        (decode(streams=3, tokens=251), 2),  # ten streams in 40 ms are 250 tokens a second
        (decode(streams=200, slope=0.0), 4),  # no more than 64 each, however fast
        (decode(streams=3, base=0.06), 3),  # too slow for the target even alone
        (decode(streams=1, used_blocks=151), 4),
    ],
)
def test_decode_is_wanted_for_its_tokens_its_steps_and_its_memory(signals: DecodeSignals, wanted: int) -> None:
    assert autoscale(signals, DECODE) == wanted


def test_what_a_decode_worker_gives_may_be_said_instead_of_learned() -> None:
    rules = DecodeRules(max_replicas=20, tokens_per_s=100.0)
    assert autoscale(decode(streams=3, tokens=251), rules) == 3


def test_rules_of_one_role_are_none_for_the_other() -> None:
    with pytest.raises(TypeError):
        autoscale(prefill(), DECODE)


def patience(**rules: Any) -> Patience:
    return Patience(PrefillRules(**{"max_replicas": 9, "up_after_s": 5.0, "down_after_s": 60.0, **rules}))


def test_a_burst_that_ends_moves_nothing() -> None:
    waits = patience()
    for second in range(100):
        assert waits.decide(5 if second % 4 == 0 else 2, 2, second) == 2


def test_what_is_asked_for_long_enough_is_given_and_no_more_than_was_asked_all_the_time() -> None:
    waits = patience()
    given = [waits.decide(4 + (second == 3), 2, second) for second in range(7)]
    assert given == [2, 2, 2, 2, 2, 4, 4]


def test_fewer_are_kept_only_when_nothing_asked_for_more_for_a_while() -> None:
    waits = patience()
    given = []
    replicas = 4
    for second in range(130):
        replicas = waits.decide(3 if second == 30 else 1, replicas, second)
        given.append(replicas)
    assert given[59] == 4
    assert given[60] == 3, "no less than the most of the last minute"
    assert given[90] == 3
    assert given[91] == 1


def test_after_a_time_without_sight_one_look_is_no_reason_to_drain() -> None:
    waits = patience()
    for second in range(100):
        waits.decide(4, 4, second)
    waits.forget()
    assert waits.decide(1, 4, 1000.0) == 4
    assert waits.decide(9, 4, 1001.0) == 4


@given(
    st.lists(st.tuples(st.integers(-5, 50), st.floats(0, 30)), min_size=1, max_size=60),
    st.integers(0, 30),
    st.floats(0, 60),
    st.floats(0, 60),
)
def test_replicas_stay_within_bounds_and_go_only_where_they_were_asked_to(
    asked: list[tuple[int, float]], replicas: int, up: float, down: float
) -> None:
    rules = PrefillRules(min_replicas=2, max_replicas=9, up_after_s=up, down_after_s=down)
    waits, now = Patience(rules), 0.0
    for number, wait in asked:
        now += wait
        before, replicas = replicas, waits.decide(number, replicas, now)
        assert 2 <= replicas <= 9
        if replicas > max(before, 2):
            assert number >= replicas
        if replicas < min(before, 9):
            assert number <= replicas


# -- signals ---------------------------------------------------------------------------------------------------------


def view(role: str, name: str = "w", state: str = "ready", **load: Any) -> WorkerView:
    fields = {
        "num_blocks": 100, "free_blocks": 100, "num_waiting": 0, "num_running": 0, "waiting_tokens": 0,
        "prefill_tokens_per_s": 0.0, "decode_step_s": 0.0,
    }  # fmt: skip
    return WorkerView(name=name, role=role, state=state, **(fields | load))


def test_busy_is_a_mean_over_half_a_minute_and_queues_are_seconds_of_one_worker() -> None:
    watch = Watch()
    for second in range(100):
        busy = view("prefill", waiting_tokens=1000, prefill_tokens_per_s=500.0)
        idle = view("prefill", prefill_tokens_per_s=500.0)
        signals = watch.prefill([busy, busy if second % 2 else idle], TARGETS, float(second))
    assert signals is not None
    assert signals.busy == pytest.approx(1.5, abs=1 / WINDOW_S)
    assert signals.queued_s == pytest.approx(4.0)
    assert signals.wait_s == pytest.approx(2.0)
    assert signals.growth == 0.0


def test_queues_that_grow_tell_how_much_more_arrives_than_is_computed() -> None:
    watch = Watch()
    for second in range(60):
        worker = view("prefill", waiting_tokens=250 * second, prefill_tokens_per_s=500.0)
        signals = watch.prefill([worker], TARGETS, float(second))
        assert signals is not None
        assert signals.growth <= 0.5 + 1e-9  # two looks one after the other say nothing yet
    assert signals.growth == pytest.approx(0.5)


def test_streams_of_a_draining_worker_count_and_its_room_does_not() -> None:
    watch = Watch()
    workers = [
        view("decode", num_running=4, num_waiting=1, free_blocks=60, decode_step_s=0.02),
        view("decode", state="draining", num_running=3, free_blocks=70),
        view("decode", state="loading"),
    ]
    signals = watch.decode(workers, TARGETS, 64, 0.0)
    assert signals is not None
    assert signals.tokens_per_s == pytest.approx(200)
    assert (signals.streams, signals.used_blocks, signals.blocks_per_worker) == (8, 70, 100)


def test_how_a_step_grows_is_learned_from_what_workers_measure() -> None:
    watch = Watch()
    for streams in range(1, 30):
        workers = [view("decode", num_running=streams, decode_step_s=0.01 + 0.002 * streams)]
        signals = watch.decode(workers, TARGETS, 64, float(streams))
    assert signals is not None
    assert signals.step_base_s == pytest.approx(0.01, rel=0.05)
    assert signals.step_slope_s == pytest.approx(0.002, rel=0.05)


def test_a_role_without_a_ready_worker_or_without_replicas_is_left_alone() -> None:
    scaler = Autoscaler(PrefillScaling(), DecodeScaling())
    workers = [view("prefill", state="loading"), view("decode", num_running=1)]
    advice = scaler.look(workers, TARGETS, {"prefill": 1, "decode": 1}, 0.0)
    assert set(advice) == {"decode"}
    assert scaler.look(workers, TARGETS, {"prefill": 0, "decode": 0}, 1.0) == {}


def test_a_gateway_that_answers_something_else_is_an_error_and_no_reason_to_scale() -> None:
    for document in (
        {},
        {"gateway": {"placement": {"m": {"targets": {"ttft_s": None, "itl_s": 1}}}}, "workers": []},
        [],
    ):
        with pytest.raises(KvferryError):
            parsed(document)  # type: ignore[arg-type]


def row(name: str, model: str, unserved: str | None = None, **load: Any) -> dict[str, Any]:
    zeros = dict.fromkeys(WorkerView.__slots__, 0)
    return {**zeros, "name": name, "role": "decode", "state": "ready", "model": model, "unserved": unserved,
            "load": zeros | load}  # fmt: skip


def test_each_model_is_judged_by_its_own_workers_and_targets() -> None:
    targets = {"a": {"ttft_s": 1.0, "itl_s": 0.05}, "b": {"ttft_s": 4.0, "itl_s": 0.2}}
    workers = [row("d0", "a", num_running=9), row("d1", "b"), row("d2", "b", "another vocabulary"), row("d3", "gpt-9")]
    placement = {model: {"targets": own} for model, own in targets.items()}
    found = parsed({"gateway": {"placement": placement}, "workers": workers})
    assert {model: [view.name for view in views] for model, (views, _) in found.items()} == {"a": ["d0"], "b": ["d1"]}
    assert {model: own.itl_s for model, (_, own) in found.items()} == {"a": 0.05, "b": 0.2}
    assert chosen(found, "", several=True) == found
    assert chosen(found, "b", several=False) == {"b": found["b"]}
    with pytest.raises(KvferryError, match="which of a, b"):
        chosen(found, "", several=False)
    with pytest.raises(KvferryError, match="serves no 'c'"):
        chosen(found, "c", several=True)


# -- commands --------------------------------------------------------------------------------------------------------


async def test_a_command_is_given_role_and_replicas_as_words_without_a_shell(tmp_path: Any) -> None:
    told = tmp_path / "told $(it)"
    target = CommandTarget(f"/bin/sh -c 'echo \"$1 $2\" > \"$3\"' x {{role}} {{replicas}} '{told}'")
    assert await target.replicas("m", {"prefill": 1, "decode": 2}) == {"prefill": 1, "decode": 2}
    await target.scale("m", "decode", 3)
    assert told.read_text() == "decode 3\n"
    assert await target.replicas("m", {"prefill": 1, "decode": 2}) == {"prefill": 1, "decode": 3}
    assert await target.replicas("n", {"prefill": 1, "decode": 2}) == {"prefill": 1, "decode": 2}
    assert not target.tells_models_apart
    target = CommandTarget(f"/bin/sh -c 'echo \"$1 $2\" > \"$3\"' x {{role}}-{{model}} {{replicas}} '{told}'")
    assert target.tells_models_apart
    await target.scale("{role}", "decode", 4)
    assert told.read_text() == "decode-{role} 4\n", "a model's name is put in as it is"


async def test_a_command_that_fails_says_why_and_counts_as_not_done() -> None:
    target = CommandTarget("/bin/sh -c 'echo no such set >&2; exit 3' {role} {replicas}")
    with pytest.raises(ScalingFailed, match="ended with 3: no such set"):
        await target.scale("m", "decode", 3)
    assert await target.replicas("m", {"decode": 2}) == {"decode": 2}
    with pytest.raises(ScalingFailed, match="No such file"):
        await CommandTarget("/no/such/command {role} {replicas}").scale("m", "decode", 1)


@pytest.mark.parametrize("command", ["", "scale {role}", "scale {replicas}", "scale '{role} {replicas}"])
def test_a_command_that_cannot_say_what_is_wanted_is_refused(command: str) -> None:
    with pytest.raises(SettingError, match="--command"):
        CommandTarget(command)
