"""The time that the hypervisor takes, read from the kernel's own count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bench.steal import Steal, stolen_s


def _stat(path: Path, ticks: int) -> Path:
    path.write_text(f"cpu  1 2 3 4 5 6 7 {ticks} 0 0\ncpu0 1 2 3 4 5 6 7 99 0 0\n", encoding="ascii")
    return path


def test_the_share_is_of_all_cores_and_of_the_time_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("bench.steal.blocking_clock", lambda: next(clock))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    steal = Steal(_stat(tmp_path / "stat", 3 * tick))
    _stat(tmp_path / "stat", 4 * tick)
    assert steal.share() == pytest.approx(1 / 20)


def test_a_kernel_that_does_not_tell_is_said_so(tmp_path: Path) -> None:
    assert stolen_s(tmp_path / "absent") is None
    assert str(Steal(tmp_path / "absent")) == "not told"
    (tmp_path / "old").write_text("cpu  1 2 3 4\n", encoding="ascii")
    assert stolen_s(tmp_path / "old") is None


def test_this_kernel_tells() -> None:
    assert stolen_s() is not None or not Path("/proc/stat").exists()
