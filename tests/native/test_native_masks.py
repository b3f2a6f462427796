"""What masks cost a step of the real model: as good as nothing, because they are made while the forward pass runs."""

from __future__ import annotations

from pathlib import Path

from bench.grammar_steps import Steps
from runners import native_library


def test_masks_take_a_small_part_of_a_step_and_it_does_not_wait_for_them(model_dir: Path) -> None:
    """`python -m bench grammar` has the figures, and the promise of 5 %; here other processes share the cores."""
    native_library()  # or skip
    with Steps(model_dir) as steps:
        turns = steps.turns(4, rounds=2)
    assert turns.making_share < 0.25
    assert turns.longer < 0.5
