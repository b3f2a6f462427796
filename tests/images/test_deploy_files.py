"""Files for the images and their observers, held against what they speak of. Needs no container engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import yaml
from compose_stack import ROOT

ROLES = ("prefill", "decode")
DEPLOY = ROOT / "deploy"
REQUIREMENTS = DEPLOY / "images" / "requirements.py"


def test_both_workers_images_share_every_layer_but_their_command() -> None:
    prefill, decode = ((ROOT / "services" / role / "Dockerfile").read_text().splitlines() for role in ROLES)
    different = [(a, b) for a, b in zip(prefill, decode, strict=True) if a != b and not a.startswith("#")]
    assert [pair[0].split()[0] for pair in different] == ["ENTRYPOINT", "CMD"]


def test_an_image_installs_what_the_extras_require_and_leaves_out_what_it_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    command = [sys.executable, str(REQUIREMENTS), str(ROOT / "pyproject.toml"), "worker", "ucx", "--without", "torch"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    whole = [*project["dependencies"], *extras["worker"], *extras["ucx"]]
    assert set(whole) - set(printed) == {requirement for requirement in whole if requirement.startswith("torch")}
    assert set(printed) < set(whole)


def test_an_extra_that_does_not_exist_stops_the_build() -> None:
    command = [sys.executable, str(REQUIREMENTS), str(ROOT / "pyproject.toml"), "workers"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "workers" in done.stderr


def test_prometheus_scrapes_every_service_that_has_metrics_on_the_port_of_its_image() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    scraped = {
        name: sd["port"] for job in config["scrape_configs"] for sd in job["dns_sd_configs"] for name in sd["names"]
    }
    served = {}
    for name, service in services.items():
        dockerfile = service.get("build", {}).get("dockerfile", "")
        if dockerfile.startswith("services/") and name not in ("credentials", "model"):
            (exposed,) = re.findall(r"^EXPOSE (\d+)", (ROOT / dockerfile).read_text(), re.MULTILINE)
            served[name] = int(exposed)
    assert scraped == served


def expressions() -> list[str]:
    dashboards = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
    panels: list[dict[str, Any]] = [panel for path in dashboards for panel in json.loads(path.read_text())["panels"]]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def unknown_metrics(expression: str) -> set[str]:
    documented = set(re.findall(r"^\| `(kvferry_\w+)`", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE))
    return {name.removesuffix("_bucket") for name in re.findall(r"kvferry_\w+", expression)} - documented


@pytest.mark.parametrize("expression", expressions())
def test_every_panel_asks_for_metrics_that_exist(expression: str) -> None:
    assert re.search(r"kvferry_\w+", expression)
    assert unknown_metrics(expression) == set()


def test_a_metric_that_does_not_exist_would_be_found() -> None:
    assert unknown_metrics("rate(kvferry_ttft_seconds_bucket[1m]) + kvferry_ttft") == {"kvferry_ttft"}
