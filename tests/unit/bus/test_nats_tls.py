"""The bus over TLS, to a real NATS server: nothing is said to a server that is not the one that was meant."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from bus_probes import Changes, Collector
from certificates import Authority, Certificate
from nats_server import NatsServer

from kvferry.bus.nats import NatsBus
from kvferry.errors import BusUnavailable, SettingError
from kvferry.runtime import SystemRuntime

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@asynccontextmanager
async def tls_server(shown: Certificate, clients: Authority | None = None) -> AsyncIterator[NatsServer]:
    """`clients`: it asks for a certificate of this authority."""
    tls: dict[str, Any] = {"cert_file": str(shown.certificate), "key_file": str(shown.key)}
    if clients is not None:
        tls |= {"ca_file": str(clients.certificate), "verify": True}
    server = NatsServer(options={"tls": tls})
    await server.embedded.start()
    try:
        yield server
    finally:
        await server.embedded.stop()


async def refused(server: NatsServer, **tls: str) -> str:
    with pytest.raises(BusUnavailable) as caught:
        await NatsBus(server.settings("x", **tls), SystemRuntime()).start()
    assert server.password not in str(caught.value)
    return str(caught.value)


async def test_messages_pass_over_tls_also_after_the_server_was_lost(authority: Authority) -> None:
    async with tls_server(authority.sign("server")) as server:
        bus = NatsBus(server.settings("a", tls_ca=str(authority.certificate)), SystemRuntime())
        changes, heard = Changes(bus), Collector()
        await bus.start()
        await bus.subscribe("news", heard)
        await bus.publish("news", bytes(1 << 20))
        await heard.until(1)
        await server.kill()
        await server.restart()
        await changes.until(False)
        await changes.until(True)
        await bus.publish("news", b"again")
        await heard.until(2)
        assert [len(payload) for payload in heard.payloads] == [1 << 20, 5]
        await bus.close()


async def test_a_server_that_another_authority_signed_or_for_another_host_or_too_long_ago_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    trusted = {"tls_ca": str(authority.certificate)}
    async with tls_server(stranger.sign("server")) as server:
        assert "KVFERRY_NATS_TLS_CA" in await refused(server, **trusted)
    async with tls_server(authority.sign("elsewhere", "nats.example")) as server:
        assert "mismatch" in await refused(server, **trusted)
    async with tls_server(authority.sign("old", expired=True)) as server:
        assert "expired" in await refused(server, **trusted)


async def test_a_server_that_asks_for_a_certificate_gets_ours_and_refuses_others(
    authority: Authority, tmp_path: Path
) -> None:
    clients = Authority(tmp_path / "clients")
    ours, strangers = clients.sign("worker"), Authority(tmp_path / "stranger").sign("worker")
    trusted = {"tls_ca": str(authority.certificate)}
    async with tls_server(authority.sign("server"), clients) as server:
        shown = {"tls_cert": str(ours.certificate), "tls_key": str(ours.key)}
        bus = NatsBus(server.settings("a", **trusted, **shown), SystemRuntime())
        await bus.start()
        await bus.close()
        await refused(server, **trusted)
        await refused(server, **trusted, tls_cert=str(strangers.certificate), tls_key=str(strangers.key))


async def test_certificates_are_read_again_for_each_connection(authority: Authority, tmp_path: Path) -> None:
    others = Authority(tmp_path / "others")
    shown, ours = authority.sign("server"), authority.sign("bus")
    trusted = tmp_path / "trusted.pem"
    shutil.copy(authority.certificate, trusted)
    clients = Authority(tmp_path / "clients")
    shutil.copy(authority.certificate, clients.certificate)
    async with tls_server(shown, clients) as server:
        tls = {"tls_ca": str(trusted), "tls_cert": str(ours.certificate), "tls_key": str(ours.key)}
        bus = NatsBus(server.settings("a", **tls), SystemRuntime())
        changes = Changes(bus)
        await bus.start()
        await server.kill()
        await changes.until(False)
        for new, old in ((others.sign("server"), shown), (others.sign("bus"), ours)):
            shutil.copy(new.certificate, old.certificate)
            shutil.copy(new.key, old.key)
        for authority_file in (trusted, clients.certificate):
            shutil.copy(others.certificate, authority_file)
        await server.restart()
        await changes.until(True)
        await bus.close()


async def test_a_server_without_tls_does_not_learn_the_password_where_tls_was_asked_for(
    nats: NatsServer, authority: Authority
) -> None:
    assert "no TLS" in await refused(nats, tls_ca=str(authority.certificate))
    assert "no TLS" in await refused(nats, url=nats.embedded.url.replace("nats://", "tls://"))
    heard = await what_a_server_without_tls_hears(nats, {"tls_ca": str(authority.certificate)})
    assert heard == b"", "not even our name"
    heard = await what_a_server_without_tls_hears(nats, {})
    assert nats.password.encode() in heard, "negative control"


async def what_a_server_without_tls_hears(nats: NatsServer, tls: dict[str, str]) -> bytes:
    """Of a client who takes somebody in the middle, who only says that he asks for a password, for the server."""
    heard = bytearray()
    over = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","max_payload":8388608,"auth_required":true}\r\n')
        while (line := await reader.readline()) and not heard:
            heard.extend(line)
            writer.write(b"-ERR 'Authorization Violation'\r\n")
        writer.close()
        over.set()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(BusUnavailable):
        await NatsBus(nats.settings("x", url=f"nats://127.0.0.1:{port}", **tls), SystemRuntime()).start()
    async with asyncio.timeout(60):
        await over.wait()
    server.close()
    await server.wait_closed()
    return bytes(heard)


async def test_files_that_are_none_are_named_with_their_setting(
    nats: NatsServer, authority: Authority, tmp_path: Path
) -> None:
    ours, other = authority.sign("ours"), authority.sign("other")
    locked = authority.sign("locked", password="hush")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    cases = [
        ({"tls_ca": str(garbage)}, "KVFERRY_NATS_TLS_CA", "garbage.pem"),
        ({"tls_cert": "/nowhere.pem", "tls_key": str(ours.key)}, "KVFERRY_NATS_TLS_CERT", "/nowhere.pem"),
        ({"tls_cert": str(ours.certificate), "tls_key": "/nowhere.key"}, "KVFERRY_NATS_TLS_KEY", "/nowhere.key"),
        ({"tls_cert": str(ours.certificate), "tls_key": str(other.key)}, "KVFERRY_NATS_TLS_KEY", "is not the key of"),
        ({"tls_cert": str(locked.certificate), "tls_key": str(locked.key)}, "KVFERRY_NATS_TLS_KEY", "encrypted"),
        ({"tls_cert": str(garbage), "tls_key": str(garbage)}, "KVFERRY_NATS_TLS_CERT", "garbage.pem"),
    ]
    for files, setting, problem in cases:
        with pytest.raises(SettingError, match=problem) as caught:
            await NatsBus(nats.settings("x", **files), SystemRuntime()).start()
        assert caught.value.setting == setting
