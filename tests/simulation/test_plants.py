"""The simulation finds what it is for: each bug of `plants.py` fails the seed that its search has found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from plants import FOUND, PLANTS, Edit, Plant, PlantDoesNotApply, copied_tree, planted, simulation

SEEDS: dict[str, int] = json.loads(FOUND.read_text())
# Whatever changes the product changes all histories: where the seed that was found shows nothing any more, one of the
# next few must. Then it is time for `make simulate-plants`.
NEXT_SEEDS = 15
TIMEOUT_S = 280.0


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with copied_tree() as root:
        yield root


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_fails_the_seed_that_was_found_for_it(plant: Plant, tree: Path) -> None:
    seeds = ("--first", str(SEEDS[plant.name]), "--seeds", str(1 + NEXT_SEEDS), "--first-failure")
    with planted(plant, tree):
        run = simulation(tree, "sweep", *seeds, "--processes", "1", timeout=TIMEOUT_S)
    assert run.returncode == 1, "not found: see `make simulate-plants`"
    assert "again: python tests/simulation seed" in run.stdout, run.stderr[-2000:]


def test_a_plant_whose_text_is_gone_is_an_error(tree: Path) -> None:
    gone = Plant("gone", (Edit("shared/kvferry/wire/frame.py", "text that stands nowhere", ""),))
    with pytest.raises(PlantDoesNotApply), planted(gone, tree):
        pass
