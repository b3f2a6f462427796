"""The alert rules: checked by promtool, and each one made to fire, alone, by series that are healthy otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_server import ALERTS, CONFIG, alert_rules, documented_metrics, promtool

from kvferry.scaling import SERVICES, GatewayScaling
from kvferry_gateway.streams.attempt import HARMLESS_ENDS

ROOT = Path(__file__).parents[2]
INTERVAL: Final = "15s"
LOOKED_AT: Final = "20m"  # 80 samples after the first; every `for` is over by then

GATEWAY, PREFILL, DECODE = (f'job="{job}",instance="{job}-1:80"' for job in ("gateway", "prefill", "decode"))
OK = f'kvferry_request_total{{{GATEWAY},route="/v1/chat/completions",outcome="ok"}}'
REFUSED = OK.replace('"ok"', '"rate_limit_exceeded"')
NO_WORKER = OK.replace('"ok"', '"no_worker"')
NO_FAULTS = (*HARMLESS_ENDS, "deadline", "grammar")  # the last two end the request, by its own doing
CRASHED = f'kvferry_replacement_total{{{GATEWAY},reason="decode_gone"}}'
WEDGED = f'kvferry_replacement_total{{{GATEWAY},reason="wedged"}}'
GONE = f"kvferry_worker_gone_total{{{GATEWAY}}}"


def histogram(name: str, near: str, far: str) -> dict[str, str]:
    """Of a gateway: every observation is at most `near`."""
    return {
        f'{name}_bucket{{{GATEWAY},le="{near}"}}': "0+100x80",
        f'{name}_bucket{{{GATEWAY},le="{far}"}}': "0+100x80",
        f'{name}_bucket{{{GATEWAY},le="+Inf"}}': "0+100x80",
    }


# Series and values as promtool reads them: "0+100x80" grows by 100 a sample, "_" is none, "stale" the end.
HEALTHY: Final[dict[str, str]] = {
    **{f"up{{{target}}}": "1x80" for target in (GATEWAY, PREFILL, DECODE)},
    OK: "0+100x80",
    REFUSED: "0+1x80",  # 1 %
    **{f'kvferry_replacement_total{{{GATEWAY},reason="{end}"}}': "0+10x80" for end in NO_FAULTS},
    CRASHED: "1x80",
    f'kvferry_placement_total{{{GATEWAY},kind="pair"}}': "0+100x80",
    **histogram("kvferry_ttft_seconds", "1.0", "2.5"),
    **histogram("kvferry_itl_seconds", "0.05", "0.075"),
    f"kvferry_token_mismatch_total{{{GATEWAY}}}": "0x80",
    f"kvferry_bus_drop_total{{{GATEWAY}}}": "3x80",  # once, long ago
    GONE: "7x80",
    f'kvferry_kv_blocks{{{DECODE},state="free"}}': "10x80",
    f'kvferry_kv_blocks{{{DECODE},state="cached"}}': "500x80",  # may be evicted at any moment
    f'kvferry_kv_blocks{{{DECODE},state="active"}}': "490x80",
    f'kvferry_transfer_failure_total{{{DECODE},kind="connect"}}': "0x78 1 1",
    f"kvferry_lease_expiry_total{{{PREFILL}}}": "4x80",
}

# What differs from that when an alert fires; for some, which other alerts say so, too.
CASES: Final[dict[str, dict[str, str]]] = {
    "KvferryNoUsableWorker": {NO_WORKER: "_x76 2x4"},  # the first ones ever
    "KvferryTokenMismatch": {f"kvferry_token_mismatch_total{{{GATEWAY}}}": "0x60 1x20"},
    "KvferryWorkerWedged": {WEDGED: "_x60 1x20"},
    "KvferryNoPrefillWorker": {f"up{{{PREFILL}}}": "1x60 stale _x19"},
    "KvferryTargetDown": {f"up{{{GATEWAY}}}": "1x60 0x20"},
    "KvferryWorkerGone": {GONE: "7x70 8x10"},
    "KvferryWorkersFlapping": {GONE: "0x20 3x20 7x40"},
    "KvferryBusDown": {f"kvferry_bus_drop_total{{{GATEWAY}}}": "3x70 3+5x10"},
    "KvferryTtftAboveTarget": {f'kvferry_ttft_seconds_bucket{{{GATEWAY},le="1.0"}}': "0+90x80"},
    "KvferryItlAboveTarget": {f'kvferry_itl_seconds_bucket{{{GATEWAY},le="0.05"}}': "0+90x80"},
    "KvferryRequestsRefused": {REFUSED: "0+10x80"},
    "KvferryKvPoolNearlyFull": {
        f'kvferry_kv_blocks{{{DECODE},state="cached"}}': "10x80",
        f'kvferry_kv_blocks{{{DECODE},state="active"}}': "980x80",
    },
    "KvferryTransferFailures": {f'kvferry_transfer_failure_total{{{DECODE},kind="connect"}}': "0x70 4x10"},
    "KvferryLeaseExpiries": {f"kvferry_lease_expiry_total{{{PREFILL}}}": "4x60 9x20"},
    "KvferryReplacements": {CRASHED: "0+5x80"},
}
# The same alerts by their other causes.
MORE_CASES: Final[list[tuple[str, dict[str, str]]]] = [
    ("KvferryNoUsableWorker", {f"up{{{DECODE}}}": "1x60 stale _x19"}),
    ("KvferryNoUsableWorker", {NO_WORKER: "1x70 1+1x10"}),
    ("KvferryWorkerWedged", {WEDGED: "1x60 2x20"}),
]
# No alert: what was long ago, or was too little.
QUIET: Final[list[dict[str, str]]] = [
    {},
    {WEDGED: "1x80", NO_WORKER: "1x80"},
    {f"up{{{DECODE.replace('-1', '-2')}}}": "_x80"},
    {f"up{{{PREFILL}}}": "1x79 0"},  # one scrape failed
]


def case(name: str, changes: dict[str, str], fires: list[str]) -> dict[str, Any]:
    """One test of promtool: exactly these alerts fire at the end."""
    return {
        "name": name,
        "interval": INTERVAL,
        "input_series": [{"series": key, "values": values} for key, values in {**HEALTHY, **changes}.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": LOOKED_AT,
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in fires],
            }
        ],
    }


def judged(folder: Path, cases: list[dict[str, Any]], rules: Path = ALERTS) -> str:
    """What promtool has to say against the cases; nothing if they hold."""
    file = folder / "alerts_test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": INTERVAL, "tests": cases}))
    done = promtool("test", "rules", str(file))
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_prometheus_finds_nothing_wrong_with_the_configuration_and_the_rules() -> None:
    for arguments in (("check", "config", str(CONFIG)), ("check", "rules", "--lint-fatal", str(ALERTS))):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{len(alert_rules())} rules found" in done.stdout


def test_every_alert_fires_on_its_cause_and_no_other_does(tmp_path: Path) -> None:
    assert CASES.keys() == alert_rules().keys()
    cases = [case(alert, changes, [alert]) for alert, changes in [*CASES.items(), *MORE_CASES]]
    assert judged(tmp_path, cases) == ""


def test_no_alert_fires_while_all_is_well(tmp_path: Path) -> None:
    assert judged(tmp_path, [case(f"quiet {number}", changes, []) for number, changes in enumerate(QUIET)]) == ""


def test_an_alert_that_stays_silent_would_be_noticed(tmp_path: Path) -> None:
    assert "KvferryTokenMismatch" in judged(tmp_path, [case("silent", {}, ["KvferryTokenMismatch"])])


def scaling_targets() -> dict[str, Any]:
    scaling = SERVICES["gateway"].read()
    assert isinstance(scaling, GatewayScaling)
    return scaling.targets


def test_bounds_on_latency_are_the_targets_of_the_scaling_file() -> None:
    targets, rules = scaling_targets(), alert_rules()
    for alert, target in (("KvferryTtftAboveTarget", "ttft_s"), ("KvferryItlAboveTarget", "itl_s")):
        assert float(rules[alert]["expr"].rpartition(">")[2]) == targets[target]
        assert target in rules[alert]["annotations"]["summary"]


@pytest.mark.parametrize("alert", alert_rules())
def test_every_alert_says_what_is_wrong_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = alert_rules()[alert]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description"}
    row = rf"^\| `{alert}` \| {rule['labels']['severity']} \|"
    assert re.search(row, (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE), "docs/operations.md lacks it"


@pytest.mark.parametrize("alert", alert_rules())
def test_every_alert_asks_for_metrics_that_exist(alert: str) -> None:
    names = re.findall(r"kvferry_\w+", alert_rules()[alert]["expr"])
    assert {name.removesuffix("_bucket") for name in names} <= documented_metrics()


def test_compose_puts_the_rules_where_the_configuration_looks_for_them() -> None:
    volumes = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["volumes"]
    mounted = {target: ROOT / source for source, _, target in (v.removesuffix(":ro").partition(":") for v in volumes)}
    place = Path("/etc/prometheus")
    assert mounted[str(place / CONFIG.name)] == CONFIG
    for name in yaml.safe_load(CONFIG.read_text())["rule_files"]:
        assert mounted[str(place / name)] == CONFIG.parent / name
