"""The console's routes: its files, its state, and who may drain a worker."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_worker import EOS, Cluster, completion, tokens_of

from kvferry.wire.orders import Drain
from kvferry.wire.tokens import Spent
from kvferry.wire.work import DecodeRequest, PrefillRequest
from kvferry_gateway.console import route
from kvferry_gateway.console.route import DRAIN, PAGES, STATE

PAGE = Path(route.__file__).parent / "page"

pytestmark = pytest.mark.usefixtures("no_leaks")


async def state_of(cluster: Cluster, **query: Any) -> dict[str, Any]:
    response = await cluster.client.get(STATE, params=query)
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


async def row_of(cluster: Cluster, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The only request, once it is as wanted: a heartbeat may have to come first."""
    async with asyncio.timeout(60):
        while True:
            (row,) = (await state_of(cluster))["requests"]
            if wanted(row):
                return dict(row)
            await asyncio.sleep(0.02)


async def test_the_page_and_all_it_asks_for_come_from_the_gateway_under_a_strict_policy(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        texts = {}
        for path in PAGES:
            response = await cluster.client.get(path)
            assert response.status_code == 200, path
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
            texts[path] = response.text
    assert {name for name, _ in PAGES.values()} == {file.name for file in PAGE.iterdir()}
    told = re.findall(r'(?:href|src)="(console/[^"]+)"', texts["/console"])
    told += [f"console/{name}" for text in texts.values() for name in re.findall(r'import [^"]*"\./([\w.]+)"', text)]
    assert {f"/{name}" for name in told} == set(PAGES) - {"/console"}
    assert not any("http" in text.replace("HTTP", "") for text in texts.values()), "no outside host"


async def test_a_request_is_seen_on_its_way_and_its_timeline_tells_of_the_worker_it_lost(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        prefill, decode = await cluster.pair()
        decode.accepted = lambda work: decode.say(work, [EOS])
        await cluster.client.post("/v1/completions", json=completion())  # the gateway's first attempt is another's
        prefill.accepted = lambda work: prefill.hold(work, "computing", 0, (4, 15))
        decode.accepted = lambda work: decode.hold(work, "opening", 0)
        asked = asyncio.create_task(cluster.client.post("/v1/completions", json=completion("a secret prompt")))
        work = (await prefill.wait_for(PrefillRequest, 2)).work
        row = await row_of(cluster, lambda row: row["progress"] == [4, 15])
        assert (row["phase"], row["prefill"], row["decode"]) == ("prefill", "prefill-0", "decode-0")
        assert row["attempts"] == 1
        prefill.publish(work, [(0, tokens_of("x")[0])], spent=Spent(work.stream_id, 0.0, 0.01))
        decode.hold(work, "fetching", 0, (100, 400))
        assert (await row_of(cluster, lambda row: row["progress"] == [100, 400]))["phase"] == "kv"
        decode.hold(work, "running", 1)
        assert (await row_of(cluster, lambda row: row["phase"] == "decode"))["progress"] is None
        second = await cluster.speaker("xyz")
        await decode.exit("crashed")
        assert (await asked).json()["choices"][0]["text"] == "xyz"
        shown = await state_of(cluster, request=row["number"])
        assert shown["requests"] == []
        stages = dict(shown["timeline"]["stages"])
        assert stages["prefill"] >= 0.01
        assert {"placement", "messages", "decode"} <= set(stages)
        assert sum(stages.values()) == pytest.approx(shown["timeline"]["seconds"], abs=0.01)
        assert shown["ended"][0]["phase"] == "stop"
        events = shown["timeline"]["events"]
        whats = [event["what"] for event in events]
        assert whats == ["arrived", "placed", "accepted", "first token", "lost", "placed", "accepted", "ended"]
        assert [event["attempt"] for event in events if "attempt" in event] == [1, 1, 1, 2, 2]
        assert events[4]["reason"] == "decode_gone"
        assert events[5]["decode"] == second.record.name
        assert events[1]["why"]
        assert [event["at_s"] for event in events] == sorted(event["at_s"] for event in events)
        assert sum(count for _, count in shown["models"][0]["ttft"]) == 2
        assert "secret" not in str(shown)


async def test_the_state_is_for_this_machine_or_for_bearers_of_a_key(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        transport = httpx.ASGITransport(cluster.gateway.app, client=("192.0.2.7", 5))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as stranger:
            assert (await stranger.get(STATE)).status_code == 403
            assert (await stranger.get("/console")).status_code == 200
        assert (await cluster.client.get(STATE, params={"request": "x"})).status_code == 400
        assert (await state_of(cluster, request=12345))["timeline"] is None


async def test_draining_takes_a_key_even_on_this_machine(tmp_path: Path) -> None:
    body = {"incarnation": f"{1000:016x}"}
    async with Cluster(tmp_path) as cluster:
        await cluster.worker("decode", "decode-0")
        refused = await cluster.client.post(DRAIN, json=body)
        assert refused.status_code == 403
        assert "--api-key-file" in refused.json()["error"]["message"]
    keys = tmp_path / "keys"
    keys.write_text("alpha\n")
    async with Cluster(tmp_path, api_key_file=keys) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        assert (await cluster.client.post(DRAIN, json=body)).status_code == 401
        assert (await cluster.client.get(STATE)).status_code == 401
        bearer = {"authorization": "Bearer alpha"}
        assert (await cluster.client.post(DRAIN, json={"incarnation": "0"}, headers=bearer)).status_code == 400
        unknown = await cluster.client.post(DRAIN, json={"incarnation": "f" * 16}, headers=bearer)
        assert unknown.status_code == 404
        assert not worker.got(Drain)
        assert (await cluster.client.post(DRAIN, json=body, headers=bearer)).json()["worker"] == "decode-0"
        assert (await worker.wait_for(Drain)).worker_incarnation == 1000


async def test_a_client_that_leaves_ends_its_timeline(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        async with cluster.client.stream("POST", "/v1/completions", json=completion(stream=True)):
            work = (await worker.wait_for(DecodeRequest)).work
            worker.publish(work, [(0, tokens_of("x")[0])])
        async with asyncio.timeout(60):
            while not (ended := (await state_of(cluster))["ended"]):
                await asyncio.sleep(0.02)
        assert ended[0]["phase"] == "client gone"
        refused = await cluster.client.post("/v1/completions", json=completion(max_tokens=100_000))
        assert refused.status_code == 400
        worker.accepted = lambda work: worker.say(work, [EOS])
        assert (await cluster.client.post("/v1/completions", json=completion())).status_code == 200
        assert (await state_of(cluster))["ended"][0]["phase"] == "stop"
