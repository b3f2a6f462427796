"""A sweep that was cut short goes on where it was, on the same sources only."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from sweep import sweep
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
