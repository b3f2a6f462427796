"""Secrets of a cluster with a NATS server of its operator's own: who gets which, and that a real server takes them."""

from __future__ import annotations

import asyncio
import importlib.util
import stat
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from pages import parts, put, written
from pydantic import SecretStr

from kvferry.bus.base import BusSettings
from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import user_name
from kvferry.bus.server import find_nats_server
from kvferry.config.layers import load_settings
from kvferry.errors import BusUnavailable, SettingError
from kvferry.runfile import RunFile
from kvferry.runtime import SystemRuntime
from kvferry.wire.subjects import exit_subject, inbox_prefix, role_beats
from kvferry_decode.settings import DecodeSettings
from kvferry_gateway.settings import GatewaySettings
from kvferry_local.cli import main
from kvferry_local.control_plane import check_logins, control_plane, named_server
from kvferry_local.credentials import ROLES, read_credentials, write_credentials
from kvferry_local.doctor.bus import bus
from kvferry_local.settings import DoctorSettings, UpSettings
from kvferry_prefill.settings import PrefillSettings

ROOT = Path(__file__).parents[3]


def compose_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("credentials", ROOT / "deploy" / "compose" / "credentials.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server:
    """nats-server with compose's own nats.conf, but for ports and the path of its include."""

    def __init__(self, folder: Path, authorization: Path) -> None:
        text = (ROOT / "deploy" / "compose" / "nats.conf").read_text()
        text = text.replace("port: 4222", 'listen: "127.0.0.1:-1"').replace('http: "127.0.0.1:8222"', "")
        text = text.replace("../../run/nats/authorization.conf", str(authorization.relative_to(folder)))
        assert "4222" not in text
        self._config = folder / "nats.conf"
        self._config.write_text(text)

    async def __aenter__(self) -> str:
        self._process = await asyncio.create_subprocess_exec(
            find_nats_server(), "--config", str(self._config), stderr=asyncio.subprocess.PIPE
        )
        assert self._process.stderr is not None
        lines: list[str] = []
        async with asyncio.timeout(60):
            while not lines or "Server is ready" not in lines[-1]:
                line = (await self._process.stderr.readline()).decode()
                assert line, lines
                lines.append(line)
        listening = next(line for line in lines if "Listening for client connections" in line)
        return f"nats://127.0.0.1:{listening.split(':')[-1].strip()}"

    async def __aexit__(self, *exc: object) -> None:
        self._process.terminate()
        await self._process.communicate()


async def joins(settings: BusSettings, pattern: str) -> None:
    bus = NatsBus(settings, SystemRuntime())
    await bus.start()
    try:
        await bus.subscribe(pattern, lambda message: None)
    finally:
        await bus.close()


async def test_what_the_command_writes_lets_each_role_in_within_its_rights(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    (command,) = written("docs/security.md", "test_what_the_command_writes_lets_each_role_in_within_its_rights")
    _, (program, *words) = parts(put(command, {"/etc/kvferry": folder}))
    assert program == "kvferry"
    made = CliRunner().invoke(main, words)
    assert made.exit_code == 0, made.output
    files = {path.name: path for path in folder.iterdir()}
    assert set(files) == {"authorization.conf", "data-key", *(f"nats-password-{role}" for role in ROLES)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    secrets = {path.read_text() for name, path in files.items() if name != "authorization.conf"}
    assert len(secrets) == 5
    assert not any(secret in made.output for secret in secrets)
    again = CliRunner().invoke(main, words)
    assert (again.exit_code, "there already" in again.output) == (2, True)
    async with Server(tmp_path, files["authorization.conf"]) as url:
        for role, hears, not_hears in (("gateway", "decode", "gateway"), ("decode", "gateway", "decode")):
            password = files[f"nats-password-{role}"].read_text()
            settings = BusSettings(url, "x", inbox_prefix("prod", role), user_name("prod", role), password)  # type: ignore[arg-type]
            await joins(settings, role_beats("prod", hears))
            with pytest.raises(BusUnavailable, match="KVFERRY_NATS_USER"):
                await joins(settings, role_beats("prod", not_hears))


async def test_a_stack_on_a_server_of_its_operators_own_has_a_user_for_each_role(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert CliRunner().invoke(main, ["credentials", str(folder), "--cluster", "lake"]).exit_code == 0
    async with Server(tmp_path, folder / "authorization.conf") as url:
        settings = UpSettings(cluster="lake", nats_url=url, nats_credentials=folder)
        async with control_plane(settings, SystemRuntime()) as facts:
            await check_logins(facts, SystemRuntime())
            for service in (GatewaySettings, PrefillSettings, DecodeSettings):
                joined = load_settings(service, config_file=None, environ={}, flags={}, run_file=facts)
                assert joined.nats_user == f"lake-{service.role}"
            assert facts.data_key.get_secret_value() == (folder / "data-key").read_text()
            guess = facts.nats_logins["decode"].model_copy(update={"password": SecretStr("guess")})
            wrong = facts.model_copy(update={"nats_logins": {**facts.nats_logins, "decode": guess}})
            with pytest.raises(SettingError, match=r"lake-decode.*KVFERRY_NATS_USER") as caught:
                await check_logins(wrong, SystemRuntime())
            assert caught.value.setting == "--nats-credentials"
        given = settings.model_copy(update={"data_key": SecretStr("ab" * 32)})
        assert named_server(given).data_key.get_secret_value() == "ab" * 32
        assert [finding.status for finding in await bus(DoctorSettings(**dict(settings)), 8192)] == ["ok", "ok"]


def test_credentials_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    write_credentials(folder, "lake", SystemRuntime())

    def wrong(problem: str) -> None:
        with pytest.raises(SettingError, match=problem) as caught:
            read_credentials(folder, "lake")
        assert caught.value.setting == "--nats-credentials"

    (folder / "nats-password-decode").chmod(0o640)
    wrong("nats-password-decode is open to other users; run: chmod 600")
    (folder / "nats-password-decode").unlink()
    wrong("nats-password-decode: No such file")
    (folder / "nats-password-prefill").write_text("")
    wrong("nats-password-prefill is empty")
    with pytest.raises(ValueError, match="there is no --nats-url"):
        UpSettings(nats_credentials=folder)
    with pytest.raises(ValueError, match="another one beside it"):
        UpSettings(nats_url="nats://x", nats_credentials=folder, nats_user="lake")


async def test_the_compose_stacks_secrets_go_to_those_who_need_them_and_are_kept(tmp_path: Path) -> None:
    make = compose_script().make_credentials
    folder, authorization = tmp_path / "credentials", tmp_path / "authorization.conf"
    arguments = (folder, authorization, "pond", "nats://nats:4222", "http://127.0.0.1:8000")
    make(*arguments)
    first, text = {path: path.read_text() for path in folder.rglob("*.json")}, authorization.read_text()
    make(*arguments)
    assert ({path: path.read_text() for path in folder.rglob("*.json")}, authorization.read_text()) == (first, text)
    found = {role: RunFile.read(folder / role / "run.json") for role in ("gateway", "prefill", "decode")}
    assert {role: set(file.nats_logins) for role, file in found.items()} == {
        "gateway": {"gateway", "operator"}, "prefill": {"prefill"}, "decode": {"decode"},
    }  # fmt: skip
    keys = {role: file.data_key.get_secret_value() for role, file in found.items()}
    assert keys["prefill"] == keys["decode"] != keys["gateway"] == ""
    async with Server(tmp_path, authorization) as url:
        here = {role: file.model_copy(update={"nats_url": url}) for role, file in found.items()}
        await joins(bus_login(here["gateway"].in_role("gateway"), "gateway", "x"), role_beats("pond", "decode"))
        await joins(bus_login(here["prefill"].in_role("prefill"), "prefill", "x"), role_beats("pond", "gateway"))
        bus = NatsBus(bus_login(here["gateway"].in_role("operator"), "operator", "x"), SystemRuntime())
        await bus.start()
        await bus.publish(exit_subject("pond", "decode", "decode-0", 1), b"")
        await bus.close()
