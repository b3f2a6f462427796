"""The dashboard against Grafana's own models of one. What its panels ask for, a real Prometheus answers elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
PATHS = sorted((GRAFANA / "dashboards").glob("*.json"))


@pytest.fixture(autouse=True, scope="module")
def plugins() -> None:
    register_default_plugins()  # options of the kinds of panels, queries of the kinds of data sources


def unknown(dashboard: dict[str, Any]) -> list[str]:
    """Where it has what Grafana's models have no place for."""
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    return list(_missing(dashboard, understood, ""))


def _missing(given: Any, understood: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, value in given.items():
            if key in understood:
                yield from _missing(value, understood[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}"
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for place, (one, other) in enumerate(zip(given, understood, strict=True)):
            yield from _missing(one, other, f"{path}/{place}")
    elif given != understood:
        yield path


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_grafana_has_a_place_for_all_that_a_dashboard_says(path: Path) -> None:
    assert unknown(json.loads(path.read_text())) == []


def test_what_grafana_does_not_know_would_be_found() -> None:
    dashboard = json.loads(PATHS[0].read_text())
    dashboard["panels"][0]["titel"] = "misspelt"
    dashboard["panels"][1]["targets"][0]["expression"] = "up"
    assert unknown(dashboard) == ["/panels/0/titel", "/panels/1/targets/0/expression"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_panels_have_their_own_place_and_number(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "two panels lie on each other"
    assert max(x for x, _ in cells) < 24


def test_panels_ask_the_data_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    for path in PATHS:
        for panel in json.loads(path.read_text())["panels"]:
            assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
