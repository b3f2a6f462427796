"""The real Prometheus and its promtool (Debian's package `prometheus`), and what deploy/ asks of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

DEPLOY: Final = Path(__file__).parents[1] / "deploy"
CONFIG: Final = DEPLOY / "prometheus" / "prometheus.yml"
ALERTS: Final = DEPLOY / "prometheus" / "alerts.yml"
READY_TIMEOUT_S: Final = 60.0


def alert_rules() -> dict[str, dict[str, Any]]:
    """By name."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    found = {rule["alert"]: rule for rule in rules}
    assert len(found) == len(rules), "a name is given twice"
    return found


def panel_expressions() -> list[str]:
    """With all models chosen."""
    paths = sorted(DEPLOY.glob("grafana/dashboards/*.json"))
    panels = [panel for path in paths for panel in json.loads(path.read_text())["panels"]]
    return [target["expr"].replace("$model", ".*") for panel in panels for target in panel["targets"]]


def documented_metrics() -> set[str]:
    """The names in the tables of docs/architecture.md."""
    text = (DEPLOY.parent / "docs" / "architecture.md").read_text()
    return set(re.findall(r"^\| `(kvferry_\w+)`", text, re.MULTILINE))


def program(name: str) -> str:
    """Skips, with the reason, where it is not installed."""
    if (path := shutil.which(name)) is None:
        pytest.skip(f"there is no {name}: install Debian's package prometheus")
    return path


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [program("promtool"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class Prometheus:
    """One server with the shipped configuration and rules, but fixed targets, short intervals, and a free port."""

    def __init__(
        self, folder: Path, targets: Mapping[str, Sequence[str]], *, rules: Path | None = None, interval: str = "1s"
    ) -> None:
        """`targets`: addresses by job. `rules`: others than those shipped."""
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
        config["rule_files"] = [str(rules or CONFIG.parent / name) for name in config["rule_files"]]
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self._process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'series'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        watchdog = threading.Timer(READY_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            self.url = self._await_ready()
        finally:
            watchdog.cancel()
        # Its log goes on; nobody reads it, and the pipe must not fill.
        self._drain = threading.Thread(target=self._read_on, daemon=True)
        self._drain.start()

    def _await_ready(self) -> str:
        assert self._process.stderr is not None
        url, log = "", ""
        for line in self._process.stderr:
            log += line
            if found := re.search(r'msg="Listening on" address=(\S+)', line):
                url = f"http://{found[1]}"
            if "Server is ready" in line:
                assert url, log
                return url
        raise AssertionError(f"Prometheus ended with {self._process.wait()}:\n{log}")

    def _read_on(self) -> None:
        assert self._process.stderr is not None
        for _ in self._process.stderr:
            pass

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant vector. Raises `AssertionError` with Prometheus' words for a bad expression."""
        answer = httpx.post(f"{self.url}/api/v1/query", data={"query": expression}, timeout=30, trust_env=False).json()
        assert answer["status"] == "success", f"{expression}: {answer['error']}"
        assert answer["data"]["resultType"] == "vector"
        return list(answer["data"]["result"])

    def rules(self) -> list[dict[str, Any]]:
        """The rules that it has loaded, each with its health after the last evaluation."""
        answer = httpx.get(f"{self.url}/api/v1/rules", timeout=30, trust_env=False).raise_for_status().json()
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        answer = httpx.get(f"{self.url}/api/v1/alerts", timeout=30, trust_env=False).raise_for_status().json()
        return {alert["labels"]["alertname"] for alert in answer["data"]["alerts"] if alert["state"] == "firing"}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._drain.join(30)
        assert self._process.stderr is not None
        self._process.stderr.close()
