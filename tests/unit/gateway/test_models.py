"""Several models behind one gateway: each has workers, words and bounds of its own. On a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scripted_worker import CLUSTER, EOS, MODEL, PATIENCE_S, Cluster, Events, ScriptedWorker, completion, text_in
from structlog.testing import capture_logs

from kvferry.kv.events import pack_keys
from kvferry.kv.hashing import block_hashes, root_hash
from kvferry.text.vocabulary import vocabulary_id
from kvferry.wire.cache_news import CacheEvents
from kvferry.wire.fields import unpack_tokens
from kvferry.wire.messages import Codecs
from kvferry.wire.subjects import cache_subject
from kvferry.wire.work import Rejected, Work

pytestmark = pytest.mark.usefixtures("no_leaks")

OTHER = "other/7B"
OTHERS = {
    OTHER: {"backwards": True, "max_context": 128, "template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"}
}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = "x" * 100  # 6 blocks of 16 tokens


@pytest.fixture
async def cluster(no_leaks: None, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path, other_models=OTHERS) as cluster:
        yield cluster


def tokens_of(text: str, model: str) -> list[int]:
    return [1 + byte if model == MODEL else 256 - byte for byte in text.encode()]


def says(text: str) -> Callable[[ScriptedWorker], Callable[[Work], None]]:
    """All of it and an end, in the words of the worker's model."""

    def script(worker: ScriptedWorker) -> Callable[[Work], None]:
        return lambda work: worker.say(work, [*tokens_of(text, worker.record.model), EOS])

    return script


def begins(worker: ScriptedWorker, text: str) -> Callable[[Work], None]:
    """The beginning of it, and no end."""

    def speak(work: Work) -> None:
        start, tokens = len(work.generated) // 4, tokens_of(text, worker.record.model)
        for index in range(start, len(tokens)):
            worker.publish(work, [(index, tokens[index])])
        worker.hold(work, "running", len(tokens))

    return speak


async def ask(cluster: Cluster, path: str, status: int = 200, **body: Any) -> Any:
    response = await cluster.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


async def text_from(cluster: Cluster, model: str) -> str:
    answer = await ask(cluster, COMPLETIONS, **completion(model=model))
    assert answer["model"] == model
    text: str = answer["choices"][0]["text"]
    return text


def prompts(worker: ScriptedWorker) -> list[list[int]]:
    return [unpack_tokens(work.prompt).tolist() for work in worker.works]


# -- who is asked ----------------------------------------------------------------------------------------------------


async def test_each_model_has_its_own_workers_words_and_template(cluster: Cluster) -> None:
    workers = {model: await cluster.worker("decode", "decode-0", says("a b"), model=model) for model in (MODEL, OTHER)}
    for model, worker in workers.items():
        assert await text_from(cluster, model) == "a b"
        asked = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        assert (await ask(cluster, CHAT, **asked))["choices"][0]["message"]["content"] == "a b"
        templated = {MODEL: "user:hi\nassistant:", OTHER: "<hi>"}[model]
        assert prompts(worker) == [tokens_of("hello", model), tokens_of(templated, model)]
        assert {work.model for work in worker.works} == {model}
        streamed = await cluster.client.post(COMPLETIONS, json=completion(model=model, stream=True))
        assert f'"model":"{model}"' in streamed.text
    answer = await ask(cluster, "/v1/responses", model=OTHER, input="hi")
    assert answer["model"] == OTHER
    assert prompts(workers[OTHER])[-1] == tokens_of("<hi>", OTHER)


async def test_a_pair_is_of_one_model_even_where_names_formats_and_addresses_are_equal(cluster: Cluster) -> None:
    same = {"kv_format_id": "one for both", "numerics_id": "one for both", "exact": True}
    prefills, decodes = {}, {}
    for model in (MODEL, OTHER):
        prefills[model] = await cluster.worker("prefill", "prefill-0", model=model, **same)
        decodes[model] = await cluster.worker("decode", "decode-0", says("a b"), model=model, **same)
    for model in (OTHER, MODEL, MODEL, OTHER, MODEL):
        assert await text_from(cluster, model) == "a b"
    for model, count in ((MODEL, 3), (OTHER, 2)):
        for worker in (prefills[model], decodes[model]):
            assert [work.model for work in worker.works] == [model] * count
    rows = {row["incarnation"]: row for row in (await cluster.client.get("/v1/cluster")).json()["workers"]}
    for model in (MODEL, OTHER):
        row = rows[f"{decodes[model].incarnation:016x}"]
        assert (row["model"], row["pairs_with"], row["refuses"], row["unserved"]) == (model, ["prefill-0"], {}, None)


async def test_a_worker_that_returns_under_its_name_with_another_model_gets_nothing_of_the_first_one(
    cluster: Cluster,
) -> None:
    first = await cluster.worker("decode", "decode-0", says("a b"))
    assert await text_from(cluster, MODEL) == "a b"
    await first.exit("stopped")
    successor = await cluster.worker("decode", "decode-0", says("a b"), model=OTHER)
    async with asyncio.timeout(PATIENCE_S):
        while cluster.gateway.fleet.registry.state_of(first.incarnation):
            await asyncio.sleep(0.005)
    error = await ask(cluster, COMPLETIONS, 503, **completion())  # after a wait for the first one's successor
    assert error["code"] == "no_worker"
    assert MODEL in error["message"]
    assert await text_from(cluster, OTHER) == "a b"
    assert [work.model for work in successor.works] == [OTHER]


async def test_a_worker_that_says_wrong_model_is_passed_over(cluster: Cluster) -> None:
    liar = await cluster.worker("decode", "decode-0")
    liar.answer = lambda work: Rejected(work.ticket, work.attempt, "wrong_model", 0.0)
    assert (await ask(cluster, COMPLETIONS, 503, **completion()))["code"] == "no_worker"
    await cluster.worker("decode", "decode-1", says("a b"), running=9)
    assert await text_from(cluster, MODEL) == "a b"
    assert cluster.metrics.value("kvferry_refusal_total", model=MODEL, reason="wrong_model") >= 1


async def test_a_stream_whose_worker_dies_goes_on_within_its_model_and_the_other_model_s_stream_notices_nothing(
    cluster: Cluster,
) -> None:
    dying = await cluster.worker("decode", "decode-0", model=OTHER)
    spare = await cluster.worker("decode", "decode-1", says("a stream"), running=9, model=OTHER)
    bystander = await cluster.worker("decode", "decode-0")  # idle, and the best by any measure but its model
    for worker in (dying, bystander):
        worker.accepted = begins(worker, "a str")
    client = cluster.client
    async with (
        client.stream("POST", COMPLETIONS, json=completion(model=OTHER, stream=True)) as theirs,
        client.stream("POST", COMPLETIONS, json=completion(stream=True)) as ours,
    ):
        streams = {OTHER: Events(theirs), MODEL: Events(ours)}
        for events in streams.values():
            assert text_in([await events.next() for _ in range(5)]) == "a str"
        await dying.exit("crashed")
        assert text_in(await streams[OTHER].rest()) == "eam"
        assert [unpack_tokens(work.generated).tolist() for work in spare.works] == [tokens_of("a str", OTHER)]
        bystander.say(
            msgspec.structs.replace(bystander.works[0], generated=b"\0" * 20), [*tokens_of("a stream", MODEL), EOS]
        )
        assert text_in(await streams[MODEL].rest()) == "eam"
    assert len(bystander.works) == 1
    assert cluster.metrics.value("kvferry_replacement_total", model=OTHER) == 1
    assert cluster.metrics.value("kvferry_replacement_total", model=MODEL) == 0


async def test_a_stream_waits_for_its_own_model_while_another_one_s_workers_are_idle(tmp_path: Path) -> None:
    async with Cluster(tmp_path, other_models=OTHERS, replace_wait=0.5) as cluster:
        dying = await cluster.worker("decode", "decode-0", model=OTHER)
        dying.accepted = begins(dying, "a str")
        idle = await cluster.worker("decode", "decode-1", says("a b"))
        async with cluster.client.stream("POST", COMPLETIONS, json=completion(model=OTHER, stream=True)) as response:
            events = Events(response)
            await events.next()
            await dying.exit("crashed")
            async with asyncio.timeout(PATIENCE_S):
                while not (waiting := (await cluster.client.get("/v1/cluster")).json()["gateway"]["waiting"]):
                    await asyncio.sleep(0.005)
            assert waiting[0]["model"] == OTHER
            assert (await events.rest())[-1]["error"]["code"] == "no_worker"
        assert idle.works == []


async def test_a_cached_prefix_counts_within_its_model_alone(cluster: Cluster) -> None:
    # One KV format in both models, so that equal token ids have equal names: only the model tells them apart.
    caches = [await cluster.worker("prefill", f"prefill-{number}", model=OTHER) for number in range(3)]
    await cluster.worker("decode", "decode-0", says("a b"), model=OTHER)
    stranger = await cluster.worker("prefill", "prefill-9")
    await cluster.worker("decode", "decode-9", says("a b"))
    tokens = np.array(tokens_of(LONG, OTHER), dtype=np.uint32)
    keys = pack_keys(block_hashes(root_hash("format"), tokens, 16))
    for holder in (stranger, caches[2]):
        subject = cache_subject(CLUSTER, "prefill", holder.record.name, holder.incarnation)
        await holder.bus.publish(subject, Codecs().cache.encode(CacheEvents(holder.incarnation, 1, keys)))
    index = {model: cluster.gateway.fleet.placers[model].snapshot.index for model in (MODEL, OTHER)}
    async with asyncio.timeout(PATIENCE_S):
        while not (len(index[OTHER]) == len(index[MODEL]) == 6):
            await asyncio.sleep(0.005)
    for _ in range(3):
        await ask(cluster, COMPLETIONS, **completion(LONG, model=OTHER, max_tokens=8))
    assert [len(worker.works) for worker in caches] == [0, 0, 3]
    assert stranger.works == []
    placement = (await cluster.client.get("/v1/cluster")).json()["gateway"]["placement"]
    assert [placing["cached_tokens"] for placing in placement[OTHER]["latest"]] == [96] * 3
    assert placement[MODEL]["latest"] == []


# -- who is not asked ------------------------------------------------------------------------------------------------


async def test_a_model_that_the_gateway_was_not_told_of_is_shown_said_once_and_not_served(cluster: Cluster) -> None:
    with capture_logs() as lines:
        stranger = await cluster.worker("decode", "decode-0", says("a b"), model="gpt-9")
        for _ in range(3):
            await stranger.beat()
    assert [line["why"] for line in lines if line["event"] == "worker gets no request"] == [
        "the gateway was not told of a model 'gpt-9'"
    ]
    (row,) = (await cluster.client.get("/v1/cluster")).json()["workers"]
    assert row["unserved"] == "the gateway was not told of a model 'gpt-9'"
    assert (await ask(cluster, COMPLETIONS, 404, **completion(model="gpt-9")))["code"] == "model_not_found"
    assert (await ask(cluster, COMPLETIONS, 503, **completion()))["code"] == "no_worker"
    assert (await cluster.client.get("/ready")).status_code == 503
    assert stranger.works == []


async def test_a_worker_with_another_vocabulary_under_the_same_name_is_refused_by_name(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = {model: vocabulary_id(tmp_path / model / "tokenizer.json") for model in (MODEL, OTHER)}
    swapped = await cluster.worker("decode", "decode-0", says("a b"), vocabulary_id=words[OTHER])
    assert (await ask(cluster, COMPLETIONS, 503, **completion()))["code"] == "no_worker"
    (row,) = (await cluster.client.get("/v1/cluster")).json()["workers"]
    assert "its vocabulary is not that of the gateway's 'tiny'" in row["unserved"]
    await cluster.worker("decode", "decode-1", says("a b"), vocabulary_id=words[MODEL])
    assert await text_from(cluster, MODEL) == "a b"
    assert swapped.works == []


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"kv_dtype": "float32", "kv_format_id": "g"}, "KV in float32 instead of bfloat16"),
        ({"kv_dtype": "bfloat16", "kv_format_id": "g", "block_size": 32}, "KV blocks of 32 tokens instead of 16"),
        ({"kv_dtype": "bfloat16", "kv_format_id": "g"}, "other weights, quantization or RoPE"),
        (
            {"kv_dtype": "bfloat16", "numerics_id": "o", "exact": True},
            "numerics 'o', and this decode worker is exact",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_workers_of_one_model_that_cannot_pair_say_in_what_they_differ(
    cluster: Cluster, record: dict[str, Any], why: str
) -> None:
    decode = await cluster.worker("decode", "decode-0", says("a b"), kv_dtype="bfloat16", exact=True)
    with capture_logs() as lines:
        prefill = await cluster.worker("prefill", "prefill-0", **record)
    assert [line["why"] for line in lines if line["event"] == "workers don't pair"] == [why]
    rows = {row["role"]: row for row in (await cluster.client.get("/v1/cluster")).json()["workers"]}
    assert (rows["decode"]["pairs_with"], rows["decode"]["refuses"]) == ([], {"prefill-0": why})
    assert await text_from(cluster, MODEL) == "a b", "the decode worker computes the prompt itself"
    assert (len(decode.works), prefill.works) == (1, [])


# -- how requests name them -----------------------------------------------------------------------------------------


async def test_a_request_names_its_model_where_there_are_several(cluster: Cluster) -> None:
    await cluster.worker("decode", "decode-0", says("a b"))
    bodies = {
        COMPLETIONS: {"prompt": "hello"},
        CHAT: {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/responses": {"input": "hi"},
        "/tokenize": {"prompt": "hello"},
        "/detokenize": {"tokens": [5]},
    }
    for path, body in bodies.items():
        error = await ask(cluster, path, 400, **body)
        assert (error["param"], error["code"]) == ("model", "missing_required_parameter")
        assert f"{MODEL}, {OTHER}" in error["message"]
        error = await ask(cluster, path, 404, **body, model="gpt-9")
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert cluster.metrics.value("kvferry_request_total", model="", outcome="model_not_found") == 3


async def test_a_request_needs_not_name_the_only_model(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await cluster.worker("decode", "decode-0", says("a b"))
        for path, body in (
            (COMPLETIONS, {"prompt": "hello"}),
            (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
        ):
            assert (await ask(cluster, path, **body))["model"] == MODEL
        assert (await ask(cluster, "/v1/responses", input="hi"))["model"] == MODEL


async def test_every_model_is_listed_with_what_its_own_workers_hold(cluster: Cluster) -> None:
    await cluster.worker("decode", "decode-0", says("a b"), num_blocks=4)
    listed = (await cluster.client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [(MODEL, 64), (OTHER, None)]
    for model in listed:
        assert (await cluster.client.get(f"/v1/models/{model['id']}")).json() == model
    assert (await cluster.client.get("/v1/models/other")).status_code == 404
    assert (await cluster.client.get("/ready")).json() == {"status": "ready", "models": [MODEL]}
    for model, limit in ((MODEL, 64), (OTHER, 128)):
        found = await ask(cluster, "/tokenize", model=model, prompt="hé")
        assert (found["tokens"], found["max_model_len"]) == (tokens_of("hé", model), limit)
        assert await ask(cluster, "/detokenize", model=model, tokens=found["tokens"]) == {"prompt": "hé"}


# -- what one model does to the other --------------------------------------------------------------------------------


async def test_a_crowd_at_one_model_turns_nobody_of_the_other_away(tmp_path: Path) -> None:
    async with Cluster(tmp_path, other_models=OTHERS, max_requests=2) as cluster:
        busy = await cluster.worker("decode", "decode-0", model=OTHER)
        await cluster.worker("decode", "decode-1", says("a b"))
        waiting = [asyncio.create_task(ask(cluster, COMPLETIONS, **completion(model=OTHER))) for _ in range(2)]
        await busy.until(lambda: len(busy.works) == 2)
        error = await ask(cluster, COMPLETIONS, 429, **completion(model=OTHER))
        assert error["code"] == "rate_limit_exceeded"
        assert (await ask(cluster, COMPLETIONS, 429, **completion(n=3)))["code"] == "rate_limit_exceeded"
        assert await text_from(cluster, MODEL) == "a b"
        assert cluster.metrics.value("kvferry_live_requests", model=OTHER) == 2
        assert cluster.metrics.value("kvferry_live_requests", model=MODEL) == 0
        for work in busy.works:
            busy.say(work, [*tokens_of("done", OTHER), EOS])
        assert [answer["choices"][0]["text"] for answer in await asyncio.gather(*waiting)] == ["done", "done"]


async def test_figures_and_targets_are_kept_by_model(tmp_path: Path) -> None:
    scaling = tmp_path / "scaling.yaml"
    scaling.write_text("targets: {ttft_s: 1.0, itl_s: 0.05}\nmodels: {other/7B: {itl_s: 0.2}}\n")
    async with Cluster(tmp_path, other_models=OTHERS, scaling_file=scaling) as cluster:
        for number, model in enumerate((MODEL, OTHER)):
            await cluster.worker("decode", f"decode-{number}", says("a b"), model=model)
        await text_from(cluster, MODEL)
        for _ in range(2):
            await text_from(cluster, OTHER)
        for model, count in ((MODEL, 1), (OTHER, 2)):
            for name in ("kvferry_request_total", "kvferry_placement_total", "kvferry_ttft_seconds_count"):
                assert cluster.metrics.value(name, model=model) == count, name
            assert cluster.metrics.value("kvferry_generated_token_total", model=model) == 4 * count
        placement = (await cluster.client.get("/v1/cluster")).json()["gateway"]["placement"]
        assert {model: placement[model]["targets"]["itl_s"] for model in placement} == {MODEL: 0.05, OTHER: 0.2}
        assert {placement[model]["targets"]["ttft_s"] for model in placement} == {1.0}
        shown = (await cluster.client.get("/console/state")).json()
        assert [(model["name"], model["ready"]) for model in shown["models"]] == [(MODEL, True), (OTHER, True)]
        assert [sum_of(model["ttft"]) for model in shown["models"]] == [1, 2]
        assert [row["model"] for row in shown["ended"]] == [OTHER, OTHER, MODEL]


def sum_of(buckets: Sequence[tuple[float | None, int]]) -> int:
    return sum(count for _, count in buckets)
