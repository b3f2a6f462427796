"""scaling.yaml: each service starts with what its file says, and what is wrong in one is named."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from kvferry.config.layers import load_settings
from kvferry.config.settings import ServiceSettings
from kvferry.errors import SettingError
from kvferry.scaling import SERVICES, DecodeScaling, PrefillScaling, Role, scaling_path
from kvferry_decode.settings import DecodeSettings
from kvferry_gateway.settings import GatewaySettings
from kvferry_local.settings import UpSettings
from kvferry_prefill.settings import PrefillSettings

ROOT = Path(__file__).parents[2]
SETTINGS: dict[Role, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
}


def load(role: Role, path: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> object:
    flags = {**flags, "scaling_file": path}
    return load_settings(SETTINGS[role], config_file=None, environ=environ or {}, flags=flags)


@pytest.mark.parametrize("role", SETTINGS)
def test_the_files_that_come_with_the_services_say_the_documented_defaults(role: Role) -> None:
    """`docs/configuration.md` is made from the classes: the file must not say something else behind its back."""
    assert scaling_path(role) == ROOT / "services" / role / "scaling.yaml"
    assert SERVICES[role].read().settings
    assert load(role) == SETTINGS[role]()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_has_a_core_beside_its_threads_and_memory_beside_its_kv(role: Role) -> None:
    scaling = SERVICES[role].read()
    assert scaling.resources.cpus == scaling.settings["threads"] + 1
    assert scaling.resources.memory.endswith("Gi")
    assert int(scaling.resources.memory[:-2]) << 10 > 2 * scaling.settings["kv_memory_mb"]


def test_a_service_starts_with_what_its_file_says_unless_something_nearer_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("settings: {max_waiting: 7, max_num_batched_tokens: 96}\n")
    settings = load("prefill", file)
    assert isinstance(settings, PrefillSettings)
    assert (settings.policy.max_waiting, settings.policy.max_num_batched_tokens) == (7, 96)
    assert settings.threads == 1
    settings = load("prefill", file, {"KVFERRY_MAX_WAITING": "8"}, max_num_batched_tokens=64)
    assert isinstance(settings, PrefillSettings)
    assert (settings.max_waiting, settings.max_num_batched_tokens) == (8, 64)


def test_one_variable_that_names_a_folder_serves_a_whole_stack(tmp_path: Path) -> None:
    for role, waiting in (("prefill", 5), ("decode", 6)):
        (tmp_path / f"{role}.yaml").write_text(f"replicas: {waiting - 3}\nsettings: {{max_waiting: {waiting}}}\n")
    (tmp_path / "gateway.yaml").write_text("replicas: 4\n")
    environ = {"KVFERRY_SCALING_FILE": str(tmp_path)}
    for role, waiting in (("prefill", 5), ("decode", 6)):
        settings = load_settings(SETTINGS[role], config_file=None, environ=environ, flags={})
        assert getattr(settings, "max_waiting") == waiting  # noqa: B009 - of both classes
    up = load_settings(UpSettings, config_file=None, environ=environ, flags={"decode": 1})
    assert (up.prefill, up.decode, up.gateways) == (2, 1, 4)


def test_one_laptop_gets_one_of_each() -> None:
    up = load_settings(UpSettings, config_file=None, environ={}, flags={})
    assert (up.prefill, up.decode, up.gateways) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("replica: 3\n", "replica in .*scaling.yaml: unknown"),
        ("replicas: many\n", "replicas in"),
        ("replicas: true\n", "replicas in"),
        ("resources: {memory: 3g}\n", "resources.memory in"),
        ("settings: {max_wait: 1}\n", "settings.max_wait in"),
        ("settings: {max_waiting: 0}\n", "settings.max_waiting in .* not 0"),
        ("settings: {name: one}\n", "settings.name in"),
        ("settings: {nats_password: hush}\n", "settings.nats_password in"),
        ("settings: {3: 4}\n", "settings.3"),
        ("targets: {ttft_s: 1}\n", "targets in"),
        ("autoscale: {utilisation: 2}\n", "autoscale.utilisation in"),
        ("autoscale: {kv_use: 0.5}\n", "autoscale.kv_use in .* unknown"),
        ("autoscale: {min_replicas: 4, max_replicas: 3}\n", "autoscale in .* min_replicas 4 is above max_replicas 3"),
        ("- 1\n", "--scaling-file"),
        ("a: [\n", "--scaling-file: .* line"),
        ("#" * (2 << 20), "--scaling-file: .* larger"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "scaling.yaml"
    file.write_text(text)
    with pytest.raises(SettingError, match=named) as caught:
        load("prefill", file)
    assert "hush" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--scaling-file"):
        load("decode", tmp_path / "none.yaml")
    with pytest.raises(SettingError, match=r"--scaling-file: .* no folder"):
        load_settings(UpSettings, config_file=None, environ={}, flags={"scaling_file": tmp_path / "none.yaml"})
    (tmp_path / "prefill.yaml").write_text("replicas: 65\n")
    for role in ("decode", "gateway"):
        (tmp_path / f"{role}.yaml").write_text("")
    with pytest.raises(SettingError, match=r"replicas in .*prefill.yaml"):
        load_settings(UpSettings, config_file=None, environ={}, flags={"scaling_file": tmp_path})


def test_a_bound_that_says_nothing_has_the_documented_value(tmp_path: Path) -> None:
    file = tmp_path / "scaling.yaml"
    file.write_text("")
    for form in (PrefillScaling, DecodeScaling):
        assert form.read(file).autoscale == form.read().autoscale


def test_a_wheel_carries_the_files_inside_the_packages(tmp_path: Path) -> None:
    """Without a compiler on PATH: what is looked at here are the files."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environ = {**os.environ, "PATH": str(tmp_path), "CXX": str(tmp_path / "none")}
    subprocess.run(build, cwd=ROOT, env=environ, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for role in SETTINGS:
            packed = archive.read(f"kvferry_{role}/scaling.yaml")
            assert yaml.safe_load(packed) == yaml.safe_load(scaling_path(role).read_bytes())
        archive.extractall(tmp_path / "site")
    program = "from kvferry.scaling import scaling_path; print(*map(scaling_path, ('gateway', 'prefill', 'decode')))"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    told = subprocess.run([sys.executable, "-c", program], env=environ, check=True, capture_output=True, text=True)
    assert told.stdout.split() == [str(tmp_path / "site" / f"kvferry_{role}" / "scaling.yaml") for role in SETTINGS]
