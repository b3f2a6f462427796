"""Settings: layers, names in errors, secrets, the run file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from click.testing import CliRunner
from pydantic import Field, SecretStr

from kvferry.command import service_command
from kvferry.config.environment import env_name, without_secrets
from kvferry.config.field import is_secret
from kvferry.config.layers import load_settings
from kvferry.config.settings import Port, ServiceSettings
from kvferry.errors import SettingError
from kvferry.runfile import MAX_RUN_FILE_BYTES, NatsLogin, RunFile, default_run_file
from kvferry_decode.settings import DecodeSettings
from kvferry_gateway.settings import GatewaySettings
from kvferry_local.settings import BenchSettings, DoctorSettings, UpSettings
from kvferry_prefill.settings import PrefillSettings

KEY = "ab" * 32


class BoatSettings(ServiceSettings):
    role: ClassVar[str] = "boat"

    port: Port = Field(8000, description="Port of the boat.")
    origins: tuple[str, ...] = Field((), description="Ports of call.")
    engine: Literal["sail", "steam"] = Field("sail", description="What drives it.")
    lights: bool = Field(False, description="Lights on.")


def load(
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    config: Path | None = None,
    run_file: RunFile | None = None,
) -> BoatSettings:
    return load_settings(BoatSettings, config_file=config, environ=environ or {}, flags=flags or {}, run_file=run_file)


def a_run_file(**changes: object) -> RunFile:
    facts: dict[str, object] = {
        "cluster": "river", "pid": os.getpid(), "nats_url": "nats://127.0.0.1:1", "nats_user": "kvferry",
        "nats_password": SecretStr("hush"), "data_key": SecretStr(KEY), "gateways": ("http://127.0.0.1:8000",),
    }  # fmt: skip
    return RunFile.model_validate({**facts, **changes})


def write_yaml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "boat.yaml"
    path.write_text(text)
    return path


def test_each_layer_wins_over_the_one_below(tmp_path: Path) -> None:
    run_file = a_run_file()
    config = write_yaml(tmp_path, "nats_url: nats://yaml:1\nport: 1\ncluster: lake\n")
    assert load().nats_url == "nats://127.0.0.1:4222"
    assert load(run_file=run_file).nats_url == "nats://127.0.0.1:1"
    assert load(run_file=run_file, config=config).nats_url == "nats://yaml:1"
    environ = {"KVFERRY_NATS_URL": "nats://env:1", "KVFERRY_PORT": "2"}
    assert load(run_file=run_file, config=config, environ=environ).nats_url == "nats://env:1"
    merged = load({"nats_url": "nats://flag:1", "port": None}, environ, config, run_file)
    assert merged.nats_url == "nats://flag:1"
    assert (merged.port, merged.cluster, merged.nats_user) == (2, "lake", "kvferry")


def test_a_variable_that_other_programs_know_is_read_too_and_yields_to_our_own(tmp_path: Path) -> None:
    known, own = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://known:4318"}, {"KVFERRY_OTLP_ENDPOINT": "http://own:4318"}
    config = write_yaml(tmp_path, "otlp_endpoint: http://yaml:4318\n")
    assert load().otlp_endpoint == ""
    assert load(config=config).otlp_endpoint == "http://yaml:4318"
    assert load(config=config, environ=known).otlp_endpoint == "http://known:4318"
    assert load(environ=known | own).otlp_endpoint == "http://own:4318"
    assert load(environ={**known, "KVFERRY_OTLP_ENDPOINT": ""}).otlp_endpoint == ""
    with pytest.raises(SettingError) as caught:
        load(environ={"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4317"})
    assert caught.value.setting == "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_a_wrong_value_is_named_as_the_user_wrote_it(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, object], dict[str, str], str | None]] = [
        ("--port", {"port": "70000"}, {}, None),
        ("KVFERRY_PORT", {}, {"KVFERRY_PORT": "tcp://10.0.0.1:80"}, None),
        ("port in ", {}, {}, "port: high\n"),
        ("--engine", {"engine": "oars"}, {"KVFERRY_ENGINE": "steam"}, None),
        ("KVFERRY_CLUSTER", {}, {"KVFERRY_CLUSTER": "a.b"}, None),
    ]
    for name, flags, environ, text in cases:
        config = write_yaml(tmp_path, text) if text else None
        with pytest.raises(SettingError) as caught:
            load(flags, environ, config)
        assert caught.value.setting.startswith(name)


def test_a_value_that_is_overridden_is_not_an_error() -> None:
    assert load({"port": "7"}, {"KVFERRY_PORT": "nonsense"}).port == 7


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prot: 1\n", "unknown setting"),
        ("- port\n", "mapping"),
        ("port: [\n", "not YAML, line"),
        ("port: !!python/object/apply:os.getpid []\n", "not YAML"),
        ("1: 2\n", "unknown setting"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        load(config=write_yaml(tmp_path, text))


def test_a_missing_or_huge_yaml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--config"):
        load(config=tmp_path / "none.yaml")
    with pytest.raises(SettingError, match="larger than"):
        load(config=write_yaml(tmp_path, "#" * (2 << 20)))


def test_lists_are_written_with_commas_outside_of_yaml(tmp_path: Path) -> None:
    assert load({"origins": "a, b,"}).origins == ("a", "b")
    assert load(environ={"KVFERRY_ORIGINS": "a"}).origins == ("a",)
    assert load(config=write_yaml(tmp_path, "origins: [a, b]\n")).origins == ("a", "b")


def test_the_name_is_the_role_unless_given() -> None:
    assert load().name == "boat"
    assert load({"name": "boat-1"}).name == "boat-1"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1  # type: ignore[misc]


def test_the_data_key_is_32_bytes_or_an_error_that_names_its_variable() -> None:
    assert load(environ={"KVFERRY_DATA_KEY": KEY}).data_key_bytes == bytes.fromhex(KEY)
    for text in ("", "zz" * 32, "ab" * 31):
        with pytest.raises(SettingError, match="KVFERRY_DATA_KEY") as caught:
            _ = load(environ={"KVFERRY_DATA_KEY": text}).data_key_bytes
        assert not text or text not in str(caught.value)


def test_no_secret_shows_in_text_or_in_errors() -> None:
    settings = load(environ={"KVFERRY_DATA_KEY": KEY, "KVFERRY_NATS_PASSWORD": "hush"})
    assert KEY not in repr(settings)
    assert "hush" not in str(settings)
    with pytest.raises(SettingError) as caught:
        load(flags={"data_key": ["hush"]})
    assert "hush" not in str(caught.value)


def test_a_secret_comes_from_a_file_that_the_environment_names(tmp_path: Path) -> None:
    file = tmp_path / "data_key"
    file.write_text(KEY + "\n")
    assert load(environ={"KVFERRY_DATA_KEY_FILE": str(file)}).data_key_bytes.hex() == KEY
    assert load(environ={"KVFERRY_DATA_KEY_FILE": "", "KVFERRY_DATA_KEY": KEY}).data_key_bytes.hex() == KEY
    assert load(
        environ={"KVFERRY_DATA_KEY_FILE": str(file)}, run_file=a_run_file(data_key=SecretStr("cd" * 32))
    ) == load(environ={"KVFERRY_DATA_KEY": KEY}, run_file=a_run_file()), "nearer than the run file"


def test_a_secret_file_that_cannot_be_used_is_named_and_never_quoted(tmp_path: Path) -> None:
    long, garbage = tmp_path / "long", tmp_path / "garbage"
    long.write_text("hush" * 2000)
    garbage.write_bytes(b"hush\xff")
    for environ in (
        {"KVFERRY_NATS_PASSWORD_FILE": str(tmp_path / "none")},
        {"KVFERRY_NATS_PASSWORD_FILE": str(long)},
        {"KVFERRY_NATS_PASSWORD_FILE": str(garbage)},
        {"KVFERRY_NATS_PASSWORD_FILE": str(long), "KVFERRY_NATS_PASSWORD": "hush"},
    ):
        with pytest.raises(SettingError, match="KVFERRY_NATS_PASSWORD_FILE") as caught:
            load(environ=environ)
        assert "hush" not in str(caught.value)


def test_every_setting_has_a_help_text_and_secrets_have_no_flag() -> None:
    async def serve(_: BoatSettings) -> None: ...

    text = CliRunner().invoke(service_command(BoatSettings, serve, summary="Sails."), ["--help"]).output
    for field, spec in BoatSettings.model_fields.items():
        assert spec.description, field
        assert (env_name(field) in text) == (spec.annotation is not SecretStr), field
    assert "--join" in text
    assert "--run-file" not in text
    assert "--data-key" not in text


def test_the_run_file_is_private_and_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "dev.json"
    written = a_run_file()
    written.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert RunFile.read(path) == written
    assert [entry.name for entry in path.parent.iterdir()] == ["dev.json"]
    a_run_file(cluster="sea").write(path)
    assert RunFile.read(path).cluster == "sea"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_run_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "dev.json"
    a_run_file().write(path)
    path.chmod(mode)
    with pytest.raises(SettingError, match="chmod 600"):
        RunFile.read(path)


def test_what_is_no_run_file_is_refused_without_quoting_it(tmp_path: Path) -> None:
    for text in ("", "{}", "[" * 1000, '{"data_key": "hush"}', "x" * (MAX_RUN_FILE_BYTES + 1)):
        path = tmp_path / "dev.json"
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(SettingError, match="--join") as caught:
            RunFile.read(path)
        assert "hush" not in str(caught.value)
    with pytest.raises(SettingError, match="kvferry up"):
        RunFile.read(tmp_path / "none.json")
    with pytest.raises(SettingError, match="directory"):
        RunFile.read(tmp_path)
    with pytest.raises(SettingError, match="regular"):
        RunFile.read(Path("/dev/null"))


def test_a_service_joins_the_stack_of_the_run_file(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    a_run_file().write(path)
    seen: list[BoatSettings] = []

    async def serve(settings: BoatSettings) -> None:
        seen.append(settings)

    command = service_command(BoatSettings, serve, summary="Sails.")
    assert CliRunner().invoke(command, ["--join", str(path), "--lights"]).exit_code == 0
    assert CliRunner(env={"KVFERRY_RUN_FILE": str(path)}).invoke(command, []).exit_code == 0
    assert [settings.cluster for settings in seen] == ["river", "river"]
    assert [settings.lights for settings in seen] == [True, False]
    assert seen[0].data_key_bytes == bytes.fromhex(KEY)


def test_a_service_joins_as_the_nats_user_of_its_role() -> None:
    logins = {role: NatsLogin(user=f"river-{role}", password=SecretStr(f"of {role}")) for role in ("boat", "ship")}
    joined = load(run_file=a_run_file(nats_user="", nats_password=SecretStr(""), nats_logins=logins))
    assert (joined.nats_user, joined.nats_password.get_secret_value()) == ("river-boat", "of boat")
    assert load(run_file=a_run_file()).nats_user == "kvferry", "one user for all"


SETTINGS = (GatewaySettings, PrefillSettings, DecodeSettings, UpSettings, BenchSettings, DoctorSettings)


def test_no_secret_of_any_settings_is_left_in_a_childs_environment() -> None:
    secrets = {env_name(f) for cls in SETTINGS for f, spec in cls.model_fields.items() if is_secret(spec)}
    assert len(secrets) >= 5
    files = {f"{name}_FILE" for name in secrets}
    others = {"KVFERRY_PORT", "KVFERRY_TOKENS_PER_MINUTE", "KVFERRY_TOOL_CALL_PARSER", "PATH", "MY_KEY"}
    assert set(without_secrets(dict.fromkeys(secrets | files | others, "x"))) == others


def test_expected_failures_are_one_line_and_bugs_keep_their_traceback() -> None:
    async def serve(settings: BoatSettings) -> None:
        if settings.lights:
            raise ZeroDivisionError
        _ = settings.data_key_bytes

    command = service_command(BoatSettings, serve, summary="Sails.")
    wrong = CliRunner().invoke(command, [])
    assert (wrong.exit_code, wrong.output.count("\n")) == (2, 1)
    assert wrong.output.startswith("kvferry: KVFERRY_DATA_KEY: ")
    assert isinstance(CliRunner().invoke(command, ["--lights"]).exception, ZeroDivisionError)


def test_the_default_run_file_lies_where_only_its_user_looks() -> None:
    assert default_run_file({"XDG_RUNTIME_DIR": "/run/user/1"}) == Path("/run/user/1/kvferry/dev.json")
    assert default_run_file({"HOME": "/home/a"}, "x") == Path("/home/a/.local/state/kvferry/x.json")
