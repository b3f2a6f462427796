"""A sweep that was cut short goes on where it was, on the same sources only."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import seed as seeds
import sweep as sweeps
from sweep import Outcome, sweep
from tally import Tally, begin, sources_digest


def test_a_sweep_in_two_pieces_comes_to_what_one_comes_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, pieces = tmp_path / "whole.json", tmp_path / "pieces.json"
    assert sweep(40, 2, 1, record=whole) == 0
    assert sweep(40, 1, 1, record=pieces) == 0
    assert sweep(40, 2, 1, record=pieces) == 0
    assert "has 1 seeds of these sources" in capsys.readouterr().out
    one, two = (msgspec.json.decode(path.read_bytes(), type=Tally) for path in (whole, pieces))
    assert (one.num_pieces, two.num_pieces) == (1, 2)
    for name in ("sources", "num_seeds", "failed", "digest", "poor", "num_requests", "num_steps", "hits"):
        assert getattr(one, name) == getattr(two, name), name
    assert one.num_seeds == 2


@pytest.mark.parametrize(("sources", "first"), [("others", 40), (None, 41)])
def test_what_ran_on_other_sources_or_from_another_seed_on_is_not_counted(
    tmp_path: Path, sources: str | None, first: int
) -> None:
    record = tmp_path / "record.json"
    kept = Tally(sources=sources or sources_digest(), first=first, num_seeds=7)
    kept.save(record)
    assert begin(40, record).num_seeds == 0
    assert begin(first, record).num_seeds == (0 if sources else 7)


def test_a_seed_that_failed_stays_failed(tmp_path: Path) -> None:
    tally = begin(3, tmp_path / "record.json")
    tally.add(3, None)
    tally.save(tmp_path / "record.json")
    assert begin(3, tmp_path / "record.json").failed == [3]
    assert "1 violations [3]" in str(tally)


def test_a_seed_with_less_than_a_seed_must_have_is_named_and_fails_the_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seeds, "MIN_STEPS", 10**9)
    monkeypatch.setattr(seeds, "MAX_ROUNDS", 1)
    assert sweep(40, 1, 1) == 1
    assert "1 seeds with less than a seed must have [40]" in capsys.readouterr().out


def test_a_sweep_that_ends_with_the_first_failure_has_recorded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "outcome_of", lambda seed: Outcome(seed, None, "planted"))
    assert sweep(7, 5, 1, first_failure=True, record=tmp_path / "record.json") == 1
    kept = begin(7, tmp_path / "record.json")
    assert (kept.num_seeds, kept.failed) == (1, [7])
