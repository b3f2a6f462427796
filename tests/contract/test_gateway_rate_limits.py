"""A key's rate limits, as its bearer meets them: the real application on a real socket, scripted workers behind it.

The clock is the real one, so limits are low: what a minute gives comes back within many seconds.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_worker import EOS, Cluster, Events, chat, completion, tokens_of

from kvferry.wire.work import Work
from kvferry_gateway.settings import GatewaySettings

pytestmark = pytest.mark.usefixtures("no_leaks")

KEYS = """
free
few requests_per_minute=3
small tokens_per_minute=100
both requests_per_minute=4 tokens_per_minute=100
"""
HEADERS = {f"x-ratelimit-{told}-{kind}" for told in ("limit", "remaining", "reset") for kind in ("requests", "tokens")}


@pytest.fixture
async def cluster(no_leaks: None, tmp_path: Path) -> AsyncIterator[Cluster]:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    async with Cluster(tmp_path, api_key_file=keys) as cluster:
        yield cluster


async def ask(cluster: Cluster, key: str, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    body = chat(**fields) if path == "/v1/chat/completions" else completion(**fields)
    return await cluster.client.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def told(response: httpx.Response, name: str) -> int:
    return int(response.headers[f"x-ratelimit-{name}"])


def refusal(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 429, response.text
    error: dict[str, Any] = response.json()["error"]
    assert (error["code"], error["param"]) == ("rate_limit_exceeded", None)
    return error


async def test_a_key_that_has_made_its_requests_is_refused_until_it_may_again(cluster: Cluster) -> None:
    await cluster.speaker("x")
    for stream, path in ((False, "/v1/completions"), (True, "/v1/chat/completions"), (False, "/v1/completions")):
        response = await ask(cluster, "few", path, stream=stream)
        assert response.status_code == 200
        assert told(response, "limit-requests") == 3
    refused = await ask(cluster, "few")
    assert refusal(refused)["type"] == "requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert told(refused, "remaining-requests") == 0
    assert (await ask(cluster, "free")).status_code == 200, "another key has its own"
    models = await cluster.client.get("/v1/models", headers={"authorization": "Bearer few"})
    assert models.status_code == 200, "only generation counts"
    assert "x-ratelimit-reset-requests" in models.headers


async def test_every_answer_to_a_limited_key_tells_its_limits(cluster: Cluster) -> None:
    await cluster.speaker("x")
    bad = await ask(cluster, "both", temperature=9)
    answers = [bad, await ask(cluster, "both"), await ask(cluster, "both", stream=True)]
    assert [answer.status_code for answer in answers] == [400, 200, 200]
    assert [told(answer, "remaining-requests") for answer in answers] == [3, 2, 1], "a wrong one counts, too"
    for answer in answers:
        assert set(answer.headers) >= HEADERS
    free = await ask(cluster, "free")
    assert not HEADERS & set(free.headers)
    assert not HEADERS & set((await ask(cluster, "nobody")).headers)


async def test_tokens_count_as_granted_while_a_request_runs_and_as_used_after_it(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    held: list[Work] = []
    worker.accepted = held.append
    asked = completion(stream=True)  # 5 tokens and up to 64
    key = {"authorization": "Bearer small"}
    async with cluster.client.stream("POST", "/v1/completions", json=asked, headers=key) as response:
        refused = await ask(cluster, "small")
        assert refusal(refused)["type"] == "tokens"
        assert told(refused, "remaining-tokens") < 69
        worker.say(held[0], [*tokens_of("x"), EOS])
        await Events(response).rest()
    worker.accepted = lambda work: worker.say(work, [*tokens_of("x"), EOS])
    for _ in range(4):  # 7 tokens each
        response = await ask(cluster, "small")
        assert response.status_code == 200, response.text
    assert told(response, "remaining-tokens") <= 100 - 69


async def test_a_request_that_nobody_could_serve_costs_no_tokens(cluster: Cluster) -> None:
    for _ in range(3):
        response = await ask(cluster, "small")  # no worker: 69 of 100 tokens would have been taken
        assert response.status_code == 503


async def test_what_a_minute_never_gives_is_refused_for_good_and_a_default_is_made_to_fit(cluster: Cluster) -> None:
    worker = await cluster.speaker("x")
    refused = await ask(cluster, "small", max_tokens=96)
    assert "too large" in refusal(refused)["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    response = await ask(cluster, "small", "/v1/chat/completions")
    assert response.status_code == 200
    assert worker.works[-1].sampling.max_tokens == 100 - response.json()["usage"]["prompt_tokens"]
    assert (await ask(cluster, "free", "/v1/chat/completions")).status_code == 200
    assert worker.works[-1].sampling.max_tokens > 100


async def test_a_key_file_that_is_read_again_forgets_nothing_of_keys_that_stay(cluster: Cluster) -> None:
    await cluster.speaker("x")
    for _ in range(3):
        assert (await ask(cluster, "few")).status_code == 200
    keys = cluster.gateway.settings.api_key_file
    assert keys is not None
    assert cluster.gateway.keys is not None
    keys.write_text("few requests_per_minute=3\nsmall requests_per_minute=1\n")
    os.utime(keys, (1, 1))
    cluster.gateway.keys.refresh()
    assert (await ask(cluster, "few")).status_code == 429
    assert [(await ask(cluster, "small")).status_code for _ in range(2)] == [200, 429]


async def test_limits_by_settings_hold_for_keys_without_their_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a\nb requests_per_minute=2\nc requests_per_minute=unlimited\n")
    async with Cluster(tmp_path, api_key_file=keys, requests_per_minute=1, tokens_per_minute=1000) as cluster:
        await cluster.speaker("x")
        for key, expected in (("a", [200, 429]), ("b", [200, 200, 429]), ("c", [200] * 4)):
            answers = [await ask(cluster, key) for _ in expected]
            assert [answer.status_code for answer in answers] == expected
            assert told(answers[0], "limit-tokens") == 1000


def test_limits_without_keys_are_a_mistake() -> None:
    for field in ("requests_per_minute", "tokens_per_minute"):
        with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} limits each key"):
            GatewaySettings(**{field: 1})
