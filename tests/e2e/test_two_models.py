"""Two models in one stack: SmolLM2 and a tiny random one with a vocabulary of its own, each on its own workers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from checkpoints import Shape, build
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from scripted_worker import EOS, VOCAB_SIZE, write_model
from stack import Stack

SMOL, TINY = "smollm2", "tiny/bytes"
LENGTHS = {SMOL: 150, TINY: 1500}  # tokens: seconds of decoding
NUM_STREAMS = 2  # of each
SHAPE = Shape(
    "bytes", "llama",
    fields={
        "vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": None, "max_position_embeddings": 2048,
        "num_hidden_layers": 8,
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def stack(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    tiny = write_model(tmp_path_factory.mktemp("models") / "other-name").path
    build(SHAPE, tiny, dtype=torch.bfloat16)
    flags = ("--model", f"{SMOL}={model_dir}", "--model", f"{TINY}={tiny}", "--threads", "1", "--max-model-len", "2048")
    # Every prompt is handed over, however short.
    stack = Stack(tmp_path_factory.mktemp("stack"), *flags, environ={"KVFERRY_LOCAL_PREFILL_THRESHOLD": "0"})
    try:
        yield stack.start()
    finally:
        stack.close()


async def told(client: AsyncOpenAI, model: str, begun: asyncio.Event) -> str:
    """One long greedy stream."""
    text, tokens = "", 0
    stream = await client.completions.create(
        model=model, prompt="The river", temperature=0, max_tokens=LENGTHS[model], stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for event in stream:
        assert event.model == model
        if event.usage is not None:
            tokens = event.usage.completion_tokens
        if event.choices:
            text += event.choices[0].text
            begun.set()
    assert tokens == LENGTHS[model], "none lost, none twice"
    return text


def counted(stack: Stack, name: str, **labels: str) -> float:
    text = httpx.get(f"{stack.url}/metrics", trust_env=False).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def decoder(stack: Stack, model: str) -> dict[str, Any]:
    (found,) = (row for row in stack.workers() if (row["model"], row["role"]) == (model, "decode"))
    return found


def test_every_model_is_listed_and_has_workers_of_its_own(stack: Stack) -> None:
    assert f"{SMOL}, {TINY}, 1 prefill + 1 decode each" in stack.output
    with stack.http() as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [SMOL, TINY]
        assert http.get("/ready").json()["models"] == [SMOL, TINY]
        unnamed = http.post("/v1/completions", json={"prompt": "x"})
        assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
    rows = {row["name"]: row for row in stack.workers()}
    assert {name: (row["model"], row["pairs_with"], row["unserved"]) for name, row in rows.items()} == {
        "prefill-0": (SMOL, [], None), "prefill-1": (TINY, [], None),
        "decode-0": (SMOL, ["prefill-0"], None), "decode-1": (TINY, ["prefill-1"], None),
    }  # fmt: skip
    listed = stack.command("status").stdout
    assert listed.count(SMOL) == listed.count(TINY) == 2
    assert stack.command("scale", "--model", TINY).stdout == "prefill=1\ndecode=1\n"
    assert stack.command("chat", "--model", TINY, "--max-tokens", "3", "hi").returncode == 0


async def test_a_worker_of_one_model_is_killed_under_streams_of_both(stack: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0) as client:
        undisturbed = {model: await told(client, model, asyncio.Event()) for model in (SMOL, TINY)}
        assert undisturbed[SMOL] != undisturbed[TINY]
        victim, bystander = decoder(stack, TINY), decoder(stack, SMOL)
        tasks: dict[str, list[asyncio.Task[str]]] = {}
        for model in (SMOL, TINY):
            begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
            tasks[model] = [asyncio.create_task(told(client, model, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
        os.kill(victim["pid"], signal.SIGKILL)
        for model in (SMOL, TINY):
            assert set(await asyncio.gather(*tasks[model])) == {undisturbed[model]}
    assert counted(stack, "kvferry_replacement_total", model=TINY) >= NUM_STREAMS
    assert counted(stack, "kvferry_replacement_total", model=SMOL) == 0
    for model in (SMOL, TINY):
        assert counted(stack, "kvferry_placement_total", model=model, kind="pair") >= NUM_STREAMS
    assert decoder(stack, TINY)["incarnation"] != victim["incarnation"]
    assert decoder(stack, SMOL)["incarnation"] == bystander["incarnation"]
