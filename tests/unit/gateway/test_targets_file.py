"""scaling.yaml: what it says is what placement aims at, and what is wrong in it is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvferry.errors import SettingError
from kvferry_gateway.placement.scaling import read_targets
from kvferry_gateway.placement.targets import Targets


def targets_in(file: Path | None) -> Targets:
    return read_targets(file, ["m"])["m"]


def test_the_file_that_comes_with_the_gateway_says_the_documented_targets() -> None:
    assert targets_in(None) == Targets()


def test_what_is_given_counts_and_the_rest_stays(tmp_path: Path) -> None:
    file = tmp_path / "scaling.yaml"
    file.write_text("targets:\n  ttft_s: 2\n  prefill_on_decode: false\n")
    assert targets_in(file) == Targets(ttft_s=2, prefill_on_decode=False)
    assert targets_in(file).max_queue_s == math.inf
    file.write_text("targets:\n  max_queue_s: null\n  itl_s: .inf\n")
    assert targets_in(file) == Targets(itl_s=math.inf)
    file.write_text("")
    assert targets_in(file) == Targets()


def test_what_a_model_has_of_its_own_stands_over_what_all_have(tmp_path: Path) -> None:
    file = tmp_path / "scaling.yaml"
    file.write_text("targets: {ttft_s: 2, itl_s: 0.1}\nmodels: {b/7B: {itl_s: 0.5, max_queue_s: 9}}\n")
    assert read_targets(file, ["a", "b/7B"]) == {
        "a": Targets(ttft_s=2, itl_s=0.1),
        "b/7B": Targets(ttft_s=2, itl_s=0.5, max_queue_s=9),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("targets:\n  ttft: 2\n", "targets.ttft "),
        ("targets:\n  ttft_s: soon\n", "targets.ttft_s "),
        ("targets:\n  ttft_s: true\n", "targets.ttft_s "),
        ("targets:\n  prefill_on_decode: 1\n", "targets.prefill_on_decode "),
        ("targets:\n  itl_s: -1\n", "itl_s: -1"),
        ("targets: [1]\n", "targets in"),
        ("models: {n: {ttft_s: 1}}\n", r"models\.n in .*: no such model; --model has m"),
        ("models: {m: {ttft: 1}}\n", "targets.ttft "),
        ("models: {m: 1}\n", "models.m in"),
        ("replicas: []\n", "replicas in"),
        ("[1]\n", "--scaling-file"),
        ("a: [\n", "--scaling-file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "scaling.yaml"
    file.write_text(text)
    with pytest.raises(SettingError, match=named):
        targets_in(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--scaling-file"):
        targets_in(tmp_path / "none.yaml")
