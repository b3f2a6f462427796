"""The simulation that placement is judged by: its arithmetic, and that it is fair to every policy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from bench.placement import Interval, split
from bench.placement_cluster import Cluster, Outcome
from bench.placement_engine import EngineRates
from bench.placement_policies import POLICIES
from bench.traces import TraceRequest, azure, excerpt, mooncake, scaled

from kvferry_gateway.placement.targets import Targets

RATES = EngineRates.fit(2000.0, 1500.0, 125.0, 500.0)


def conversations(count: int) -> list[TraceRequest]:
    """Turns of eight conversations in turn; each turn adds 4 blocks and asks for 8 tokens."""
    turns = [(turn, talk) for turn, talk in itertools.product(range(count // 8), range(8))]
    return [
        TraceRequest(0.05 * i, 32 * 4 * (turn + 1), 8, tuple(range(talk * 1000, talk * 1000 + 4 * (turn + 1))))
        for i, (turn, talk) in enumerate(turns)
    ]


def run(policy: str, requests: list[TraceRequest], seed: int = 0) -> Outcome:
    return Cluster(policy, 3, 1, RATES, Targets(), seed).run(requests)


def test_the_fit_goes_through_what_was_measured(tmp_path: Path) -> None:
    assert RATES.prefill_s(512, 0) == pytest.approx(512 / 2000)
    assert RATES.prefill_s(2048, 0) == pytest.approx(2048 / 1500)
    assert RATES.prefill_s(1024, 0) + RATES.prefill_s(1024, 1024) == pytest.approx(2048 / 1500)
    assert RATES.step_s(1, 256) == pytest.approx(1 / 125)
    assert RATES.step_s(8, 8 * 256) == pytest.approx(8 / 500)
    measured = {"prefill_512": 2000.0, "prefill_2048": 1500.0, "decode_1": 125.0, "decode_8": 500.0, "num_blocks": 7}
    (tmp_path / "rates.json").write_text(json.dumps(measured))
    read = EngineRates.read(tmp_path / "rates.json")
    assert (read.num_blocks, read.prefill_token_s) == (7, RATES.prefill_token_s)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_served_once_and_a_seed_repeats(policy: str) -> None:
    requests = conversations(80)
    outcome, again = run(policy, requests), run(policy, requests)
    assert len(outcome.ttft) == 60, "three quarters are counted"
    assert (outcome.ttft > 0).all()
    assert (outcome.itl > 0).all()
    assert np.array_equal(outcome.ttft, again.ttft)
    assert not np.array_equal(outcome.ttft, run(policy, requests, seed=1).ttft)


def test_a_lone_request_takes_what_the_engine_takes() -> None:
    outcome = run("least_loaded", [TraceRequest(1.0, 512, 11)])
    assert outcome.ttft[0] == pytest.approx(512 / 2000, rel=0.2)
    assert outcome.itl[0] == pytest.approx(1 / 125, rel=0.4), "a step each, and the hand-off"
    assert outcome.hit_rate == 0.0


def test_conversations_stay_with_their_cache_under_placement_and_not_under_round_robin() -> None:
    requests = conversations(160)
    hits = {policy: run(policy, requests).hit_rate for policy in POLICIES}
    assert hits["ours"] > 0.8
    assert hits["cached_prefix"] > 0.8
    assert hits["round_robin"] < hits["ours"] - 0.1


def test_a_small_cache_hits_less() -> None:
    small = EngineRates(**{name: getattr(RATES, name) for name in RATES.__slots__} | {"num_blocks": 45})
    requests = conversations(80)
    outcome = Cluster("ours", 3, 1, small, Targets(), 0).run(requests)
    assert outcome.hit_rate < run("ours", requests).hit_rate - 0.2


def test_traces_are_read_and_scaled(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000 * i, "input_length": 1700, "output_length": 160, "hash_ids": [0, i, i + 100, i + 200]}
        for i in range(10)
    ]
    (tmp_path / "mooncake_conversation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    requests = mooncake(tmp_path)
    assert requests[1] == TraceRequest(3.0, 106, 10, (0, 1, 101)), "the last block is not full"
    chosen = excerpt(requests, 4, seed=2)
    assert len(chosen) == 4
    assert chosen == sorted(chosen, key=lambda request: request.arrival)
    assert chosen[-1].arrival < 12.0
    spread = scaled(chosen, 2.0)
    assert spread[-1].arrival == pytest.approx(2.0)
    (tmp_path / "azure_2023_conversation.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = azure(tmp_path)
    assert (first.prompt_tokens, first.output_tokens, first.keys) == (374, 44, ())
    assert second.arrival == pytest.approx(4.314579)


def test_workers_are_split_by_what_a_trace_asks_of_each_role() -> None:
    prefill_heavy = [TraceRequest(0.0, 2000, 5)] * 10
    decode_heavy = [TraceRequest(0.0, 50, 500)] * 10
    assert split(prefill_heavy, 16, RATES)[0] >= 14
    assert split(decode_heavy, 16, RATES)[1] >= 14
    assert sum(split(prefill_heavy, 4, RATES)) == 4


def test_an_interval_is_student_s() -> None:
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
