"""Files for the images and their observers, held against what they speak of. Needs no container engine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_stack import ROOT
from prometheus_server import documented_metrics, panel_expressions

from kvferry.config.environment import env_name
from kvferry.config.layers import load_settings
from kvferry.model_source import ModelSource
from kvferry.scaling import SERVICES, Role, scaling_path
from kvferry_decode.settings import DecodeSettings
from kvferry_gateway.settings import GatewaySettings
from kvferry_prefill.settings import PrefillSettings

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


IMPORT_WITHOUT = """
import importlib, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None  # importing it fails
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["kvferry_gateway.__main__", "kvferry_local.up", "kvferry_local.doctor.service"])
def test_the_gateways_image_has_all_that_its_programs_import(module: str) -> None:
    """It lacks what only the worker's extra requires."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in lines} for extra, lines in extras.items()}
    lacking = names["worker"] - names["gateway"] - names["local"]
    assert "torch" in lacking
    command = [sys.executable, "-c", IMPORT_WITHOUT, module, ",".join(sorted(lacking))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


def test_by_default_prometheus_and_grafana_run_too_and_the_gateway_alone_has_a_published_port() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    started = {name: service for name, service in services.items() if "profiles" not in service}
    assert {"prometheus", "grafana"} <= set(started)
    published = {name: service["ports"] for name, service in started.items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:${KVFERRY_PORT:-8000}:8000"]}
    more = yaml.safe_load((DEPLOY / "compose" / "grafana-port.yml").read_text())["services"]
    assert more == {"grafana": {"ports": ["127.0.0.1:${KVFERRY_GRAFANA_PORT:-3000}:3000"]}}


def test_the_documents_name_each_image_that_no_test_can_have() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    foreign = {service["image"] for service in services.values() if not service["image"].startswith("kvferry/")}
    page = (ROOT / "docs" / "deployment.md").read_text()
    named = re.findall(r"`([\w./-]+:v?[\d.]+)`", page.partition("## Not tested here")[2])
    assert set(named) == foreign


@pytest.mark.parametrize("role", ["gateway", *ROLES])
def test_compose_starts_each_service_as_its_scaling_file_says(role: Role) -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service, scaling = document["services"][role], SERVICES[role].read()
    deploy = with_defaults(service["deploy"])
    assert int(deploy.get("replicas", 1)) == scaling.replicas
    assert int(deploy["resources"]["limits"]["cpus"]) == scaling.resources.cpus
    assert deploy["resources"]["limits"]["memory"] == scaling.resources.memory.lower().removesuffix("i")
    assert float(service["stop_grace_period"].removesuffix("s")) > scaling.settings["drain_grace"]
    (config,) = service["configs"]
    assert ROOT / document["configs"][config["source"]]["file"] == scaling_path(role)
    assert service["environment"]["KVFERRY_SCALING_FILE"] == config["target"]
    # What the file says is not said a second time: a variable would win over it.
    given = {name for name, value in service["environment"].items() if value is not None}
    assert given.isdisjoint(env_name(setting) for setting in scaling.settings)


def with_defaults(document: Any) -> Any:
    """`document` with every variable at its default."""
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", yaml.safe_dump(document)))


def all_services() -> dict[str, dict[str, Any]]:
    """Those of every profile, with the variables at their defaults."""
    document = with_defaults(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
    return dict(document["services"])


@pytest.mark.parametrize("name", all_services())
def test_every_service_is_confined_bounded_and_looked_after(name: str) -> None:
    """Also those that no test can start: from a registry, on a GPU."""
    service = all_services()[name]
    assert service["init"]
    assert service["read_only"]
    assert any(place.startswith("/tmp:size=") for place in service["tmpfs"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}
    limits = service["deploy"]["resources"]["limits"]
    assert {"memory", "pids"} <= set(limits)
    assert "cpus" in limits or "devices" in service["deploy"]["resources"]["reservations"]
    assert ("user" in service) == ("build" in service), "its own images' user, a registry's images have theirs"
    if service["restart"] == "no":
        assert service["healthcheck"] == {"disable": True}
        return
    assert service["restart"] == "unless-stopped"
    if "build" in service:
        assert "\nHEALTHCHECK " in (ROOT / service["build"]["dockerfile"]).read_text()
        assert "healthcheck" not in service
    else:
        assert ":" in service["image"], "a version"
        assert service["healthcheck"]["test"][:2] == ["CMD", "wget"]
        assert {"interval", "timeout", "start_period", "retries"} < set(service["healthcheck"])


def unknown_metrics(expression: str) -> set[str]:
    return {name.removesuffix("_bucket") for name in re.findall(r"kvferry_\w+", expression)} - documented_metrics()


@pytest.mark.parametrize("expression", panel_expressions())
def test_every_panel_asks_for_metrics_that_exist(expression: str) -> None:
    assert re.search(r"kvferry_\w+", expression)
    assert unknown_metrics(expression) == set()


def test_a_metric_that_does_not_exist_would_be_found() -> None:
    assert unknown_metrics("rate(kvferry_ttft_seconds_bucket[1m]) + kvferry_ttft") == {"kvferry_ttft"}


def test_compose_calls_a_second_model_the_same_on_its_workers_and_at_the_gateway() -> None:
    chosen = {"KVFERRY_SECOND_MODEL": "/models/qwen", "KVFERRY_SECOND_NAME": "qwen/3"}
    text = (DEPLOY / "compose" / "second-model.yml").read_text()
    overlay = yaml.safe_load(
        re.sub(r"\$\{(KVFERRY_SECOND_(?:MODEL|NAME))[^}]*\}", lambda found: chosen[found[1]], text)
    )
    base = with_defaults(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))["services"]
    added = with_defaults(overlay)["services"]
    for name, service in added.items():
        if name != "gateway":
            assert service["extends"]["file"] == "docker-compose.yml", "from the folder of the first file"
            assert name == f"second-{service['extends']['service']}"

    def environ(extended: str, name: str) -> dict[str, str]:
        merged = base[extended]["environment"] | added[name]["environment"]
        return {
            key: value for key, value in merged.items() if value is not None and key.startswith("KVFERRY_MODEL")
        } | {"KVFERRY_SERVED_MODEL_NAME": merged["KVFERRY_SERVED_MODEL_NAME"]}

    _, model, link = added["second-model"]["command"]
    assert model == "/models/qwen"
    second = ModelSource("qwen/3", f"/models/{link}")
    for role, kind in (("prefill", PrefillSettings), ("decode", DecodeSettings)):
        settings = load_settings(kind, config_file=None, environ=environ(role, f"second-{role}"), flags={})
        assert settings.source == second
        assert set(added[f"second-{role}"]["networks"]["cluster"]["aliases"]) == {role}, "Prometheus looks for it there"
    gateway = load_settings(GatewaySettings, config_file=None, environ=environ("gateway", "gateway"), flags={})
    assert gateway.sources == (ModelSource("smollm2", "/models/served"), second)


def test_each_model_of_the_volume_has_a_link_of_its_own(tmp_path: Path) -> None:
    script = (DEPLOY / "compose" / "fill-model").read_text().replace("/models", str(tmp_path))
    for name, *link in (("a",), ("b", "second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        subprocess.run(["sh", "-c", script, "fill-model", str(tmp_path / name), *link], check=True)
    assert (tmp_path / "served").readlink() == Path("a")
    assert (tmp_path / "second").readlink() == Path("b")
    wrong = ["sh", "-c", script, "fill-model", str(tmp_path / "none")]
    assert subprocess.run(wrong, check=False, capture_output=True).returncode == 1
