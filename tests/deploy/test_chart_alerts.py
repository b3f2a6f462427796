"""The alerts as the chart brings them: the same rules, about one release alone, judged by promtool."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_server import alert_rules, promtool
from test_alerts import CASES, HEALTHY, MORE_CASES, case, judged
from test_chart import FULL, LEAST, of, render

NAMESPACE, RELEASE = "llm", "demo-kvferry"
# The targets of the files: bounds that the cases are made for.
WITH_RULES: Final = {**LEAST, "monitoring": {"prometheusRule": True, "labels": {"release": "prometheus"}}}


@pytest.fixture(scope="module")
def rule() -> dict[str, Any]:
    return of(render(WITH_RULES), "PrometheusRule")


@pytest.fixture
def rules_file(rule: dict[str, Any], tmp_path: Path) -> Path:
    """Its specification is a rule file."""
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    return file


def scraped(series: str, namespace: str = NAMESPACE, release: str = RELEASE) -> str:
    """A series with the labels that Prometheus Operator gives its target."""
    return re.sub(r'job="(\w+)"', rf'namespace="{namespace}",job="{release}-\1"', series)


def in_cluster(changes: dict[str, str], fires: list[str], others: dict[str, str] | None = None) -> dict[str, Any]:
    made = case(", ".join(fires) or "quiet", changes, fires)
    for item in made["input_series"]:
        item["series"] = scraped(item["series"])
    made["input_series"] += [{"series": series, "values": values} for series, values in (others or {}).items()]
    return made


def test_the_object_has_what_its_definition_asks_for_and_no_more(rule: dict[str, Any]) -> None:
    """As monitoring.coreos.com/v1 defines it: an API server drops other fields without a word."""
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    (group,) = rule["spec"].pop("groups")
    assert rule["spec"] == {}
    rule["spec"]["groups"] = [group]
    assert group.keys() <= {"name", "interval", "labels", "limit", "query_offset", "rules"}
    for alert in group["rules"]:
        assert alert.keys() <= {"alert", "expr", "for", "keep_firing_for", "labels", "annotations"}
        assert re.fullmatch(r"(\d+[smh])+", alert.get("for", "1s"))
        for texts in (alert["labels"], alert["annotations"]):
            assert all(isinstance(text, str) for text in texts.values())


def test_prometheus_reads_all_rules_of_the_file(rules_file: Path, rule: dict[str, Any]) -> None:
    done = promtool("check", "rules", "--lint-fatal", str(rules_file))
    assert done.returncode == 0, done.stdout + done.stderr
    told = {alert["alert"]: alert for group in rule["spec"]["groups"] for alert in group["rules"]}
    assert told.keys() == alert_rules().keys()
    for name, alert in alert_rules().items():
        assert told[name] == {**alert, "expr": told[name]["expr"]}


def test_every_alert_fires_in_a_cluster_on_its_cause_alone(rules_file: Path, tmp_path: Path) -> None:
    cases = [in_cluster(changes, [alert]) for alert, changes in [*CASES.items(), *MORE_CASES]]
    assert judged(tmp_path, [in_cluster({}, []), *cases], rules_file) == ""


def test_another_releases_trouble_is_not_this_ones(rules_file: Path, tmp_path: Path) -> None:
    """Be it in another namespace, or beside it."""
    others = [("other", RELEASE), (NAMESPACE, "other-kvferry")]
    cases = [
        in_cluster({}, [], {scraped(s, *other): v for other in others for s, v in {**HEALTHY, **changes}.items()})
        for changes in CASES.values()
    ]
    assert judged(tmp_path, cases, rules_file) == ""


def test_bounds_on_latency_follow_the_releases_own_targets() -> None:
    targets = FULL["gateway"]["scaling"]["targets"]
    (group,) = of(render(FULL), "PrometheusRule")["spec"]["groups"]
    (expression,) = (alert["expr"] for alert in group["rules"] if alert["alert"] == "KvferryTtftAboveTarget")
    assert float(expression.rpartition(">")[2]) == targets["ttft_s"] != 1.0


def test_jobs_are_named_as_prometheus_operator_names_them() -> None:
    """After the Service that a monitor selects."""
    manifests = render(FULL)
    for role in ("gateway", "prefill", "decode"):
        assert of(manifests, "Service", role)["metadata"]["name"] == f"{RELEASE}-{role}"
        assert "jobLabel" not in of(manifests, "ServiceMonitor", role)["spec"]


def test_without_the_value_there_is_no_rule() -> None:
    assert not any(manifest["kind"] == "PrometheusRule" for manifest in render(LEAST))
