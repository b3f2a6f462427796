"""The gateway over HTTPS: the same answers, the same limits, and what no trusting client should accept."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from certificates import Authority, Certificate
from pydantic import SecretStr
from scripted_worker import PATIENCE_S, Cluster, Events, completion, tokens_of

from kvferry.certificate import ServerCertificate
from kvferry.errors import SettingError
from kvferry.wire.orders import Cancel
from kvferry.wire.work import DecodeRequest
from kvferry_gateway.settings import GatewaySettings
from kvferry_local.bench.client import ask
from kvferry_local.bench.endpoint import Endpoint
from kvferry_local.client import RequestFailed, Target, check, request_errors
from kvferry_local.doctor.clock import clock
from kvferry_local.settings import ClientSettings
from kvferry_local.trust import trust

pytestmark = pytest.mark.usefixtures("no_leaks")
TEXT = "over a wire that nobody reads"
PASSWORD = "opens the key"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def cluster(no_leaks: None, authority: Authority, tmp_path: Path) -> AsyncIterator[Cluster]:
    shown = authority.sign("gateway", password=PASSWORD)
    made = Cluster(
        tmp_path, tls_cert=shown.certificate, tls_key=shown.key, tls_key_password=SecretStr(PASSWORD),
        receive_timeout=0.5,
    )  # fmt: skip
    async with made as cluster:
        yield cluster


async def test_whole_and_streamed_answers_pass_over_tls_on_one_connection(cluster: Cluster) -> None:
    await cluster.speaker(TEXT)
    for _ in range(2):
        whole = await cluster.client.post("/v1/completions", json=completion())
        assert whole.json()["choices"][0]["text"] == TEXT
        async with cluster.client.stream("POST", "/v1/completions", json=completion(stream=True)) as response:
            events = await Events(response).rest()
        assert "".join(event["choices"][0]["text"] for event in events if event) == TEXT


async def test_a_client_that_trusts_another_authority_or_meant_another_host_gets_nothing(
    cluster: Cluster, tmp_path: Path, authority: Authority
) -> None:
    stranger = ssl.create_default_context(cafile=Authority(tmp_path / "stranger").certificate)
    right = ssl.create_default_context(cafile=authority.certificate)
    async with httpx.AsyncClient(verify=stranger, trust_env=False) as client:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get(f"{cluster.url}/health")
    async with httpx.AsyncClient(verify=right, trust_env=False) as client:
        assert (await client.get(f"{cluster.url}/health")).status_code == 200
        with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
            await client.get(f"{cluster.url.replace('127.0.0.1', 'localhost')}/health")
        with pytest.raises(httpx.TransportError):  # no TLS at all
            await client.get(f"{cluster.url.replace('https', 'http')}/health")


def old_client(authority: Authority, newest: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.certificate)
    context.set_ciphers("ALL:@SECLEVEL=0")  # else OpenSSL itself would not speak them
    context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, newest
    return context


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_versions_of_tls_before_1_2_are_refused(cluster: Cluster, authority: Authority) -> None:
    port = cluster.http.address[1]
    with pytest.raises((ssl.SSLError, ConnectionResetError)) as caught:
        await asyncio.open_connection("127.0.0.1", port, ssl=old_client(authority, ssl.TLSVersion.TLSv1_1))
    assert "NO_PROTOCOLS_AVAILABLE" not in str(caught.value), "the client itself would not speak it"
    new = old_client(authority, ssl.TLSVersion.TLSv1_2)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=new)
    writer.close()
    await writer.wait_closed()


async def test_what_is_refused_over_tls_says_why_and_a_silent_client_is_dropped(
    cluster: Cluster, authority: Authority
) -> None:
    trusting = ssl.create_default_context(cafile=authority.certificate)

    async def answer(request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.http.address[1], ssl=trusting)
        try:
            writer.write(request)
            async with asyncio.timeout(PATIENCE_S):
                return await reader.read()
        finally:
            writer.close()

    assert (await answer(b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000)).startswith(b"HTTP/1.1 431 ")
    late = await answer(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
    assert late.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in late
    assert (await answer(b"garbage\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert await answer(b"") == b""


async def test_the_commands_of_a_client_speak_https_with_an_authority(cluster: Cluster, authority: Authority) -> None:
    await cluster.speaker(TEXT)
    right = ClientSettings(url=cluster.url, tls_ca=authority.certificate)
    target = Target(cluster.url, None, "")
    timeout = httpx.Timeout(PATIENCE_S)
    async with target.open_async(right, timeout) as http:
        check(await http.get("/v1/models"))
    with pytest.raises(RequestFailed, match="--tls-ca"), request_errors(cluster.url):
        async with target.open_async(ClientSettings(url=cluster.url), timeout) as http:
            await http.get("/v1/models")
    tls = trust(cluster.url, authority.certificate)
    outcome = await ask(Endpoint.of(cluster.url, "", tls), "/completions", completion(), 0.0, PATIENCE_S)
    assert (outcome.error, outcome.output_tokens) == ("", len(tokens_of(TEXT)) + 1)
    outcome = await ask(Endpoint.of(cluster.url, ""), "/completions", completion(), 0.0, PATIENCE_S)
    assert outcome.error == "connection"
    found = await asyncio.to_thread(clock, {"gateway": cluster.url}, lambda url: tls)
    assert "1 peers within" in found.detail


async def test_a_client_that_does_not_read_is_given_up_over_tls_too(authority: Authority, tmp_path: Path) -> None:
    shown = authority.sign("slow")
    made = Cluster(
        tmp_path, tls_cert=shown.certificate, tls_key=shown.key, max_backlog_bytes=20_000,
        model_options={"max_context": 1 << 20},
    )  # fmt: skip
    async with made as cluster:
        worker = await cluster.worker("decode", "decode-0", max_model_len=1 << 20, num_blocks=1 << 17)
        body = json.dumps(completion(stream=True, max_tokens=500_000)).encode()
        trusting = ssl.create_default_context(cafile=authority.certificate)
        port = cluster.http.address[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        work = (await worker.wait_for(DecodeRequest)).work
        index = 0
        async with asyncio.timeout(PATIENCE_S):
            while not worker.got(Cancel):
                worker.publish(work, [(index + step, 1 + ord("x")) for step in range(500)])
                index += 500
                await asyncio.sleep(0.005)  # a step
        assert cluster.metrics.value("kvferry_slow_client_total") == 1
        writer.transport.abort()


async def certificate_shown(cluster: Cluster, authority: Authority, *, server_name: str | None = None) -> bytes:
    """To a new connection, which need not say what host it means."""
    trusting = ssl.create_default_context(cafile=authority.certificate)
    trusting.check_hostname = server_name is None
    port = cluster.http.address[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname=server_name)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    assert isinstance(shown, bytes)
    return shown


def der(certificate: Certificate) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.certificate.read_text())


def put(new: Certificate, place: Certificate) -> None:
    shutil.copy(new.certificate, place.certificate)
    shutil.copy(new.key, place.key)


async def test_a_new_certificate_is_shown_to_new_connections_and_no_stream_is_dropped(
    authority: Authority, tmp_path: Path
) -> None:
    first, second, third = (authority.sign(name) for name in ("first", "second", "third"))
    place = authority.sign("place")
    put(first, place)
    made = Cluster(tmp_path, tls_cert=place.certificate, tls_key=place.key)
    async with made as cluster:
        kept = cluster.gateway.certificate
        assert kept is not None
        worker = await cluster.worker("decode", "decode-0")
        trusting = ssl.create_default_context(cafile=authority.certificate)
        async with (
            httpx.AsyncClient(base_url=cluster.url, verify=trusting, trust_env=False, timeout=PATIENCE_S) as client,
            client.stream("POST", "/v1/completions", json=completion(stream=True, max_tokens=2)) as response,
        ):
            events = Events(response)
            work = (await worker.wait_for(DecodeRequest)).work
            worker.publish(work, [(0, tokens_of("a")[0])])
            assert (await events.next())["choices"][0]["text"] == "a"
            assert await certificate_shown(cluster, authority) == der(first)
            put(second, place)
            async with asyncio.timeout(PATIENCE_S):  # the gateway looks for itself
                while await certificate_shown(cluster, authority) != der(second):
                    await asyncio.sleep(0.05)
            assert await certificate_shown(cluster, authority, server_name="localhost") == der(second)
            shutil.copy(third.certificate, place.certificate)
            kept.refresh()
            assert await certificate_shown(cluster, authority) == der(second), "its key is not there yet"
            place.key.unlink()
            kept.refresh()
            assert await certificate_shown(cluster, authority) == der(second)
            shutil.copy(third.key, place.key)
            kept.refresh()
            assert await certificate_shown(cluster, authority) == der(third)
            worker.publish(work, [(1, tokens_of("b")[0])])
            assert (await events.next())["choices"][0]["text"] == "b"


def test_files_that_are_none_stop_the_start_and_name_their_setting(authority: Authority, tmp_path: Path) -> None:
    ours, other = authority.sign("ours"), authority.sign("other")
    locked = authority.sign("locked", password=PASSWORD)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    cases = [
        (tmp_path / "nothing", ours.key, "", "--tls-cert"),
        (ours.certificate, tmp_path / "nothing", "", "--tls-key"),
        (ours.certificate, other.key, "", "--tls-key"),
        (locked.certificate, locked.key, "", "--tls-key"),
        (locked.certificate, locked.key, "guess", "--tls-key"),
        (garbage, garbage, "", "--tls-cert"),
    ]
    for certificate, key, password, setting in cases:
        with pytest.raises(SettingError) as caught:
            ServerCertificate(certificate, key, SecretStr(password))
        assert caught.value.setting == setting, (certificate, key)
        assert "guess" not in str(caught.value)
    with pytest.raises(ValueError, match="--tls-cert"):
        GatewaySettings(tls_key=ours.key)
