"""Seeds: whole clusters, their load and their faults, each drawn from one number (`seed.py`)."""

from __future__ import annotations

import pytest
from seed import MIN_HITS, MIN_REQUESTS, MIN_STEPS, play

NUM_SEEDS = 60


# Groups: they are most of what the simulation's tests cost, so that all cores take part in them.
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.xdist_group(f"seeds {seed % 4}")) for seed in range(NUM_SEEDS)]
)
def test_every_answer_is_right_and_every_rule_holds_whatever_befalls_the_cluster(seed: int) -> None:
    story = play(seed)
    # Otherwise the seed would not show what it is for.
    assert story.num_requests >= MIN_REQUESTS
    assert story.num_steps >= MIN_STEPS
    assert len(story.hits) >= MIN_HITS
    assert story.outcomes.count("ok") >= MIN_REQUESTS // 2
