"""Workers of several ranks, of different degree on each side, in a whole stack: the tokens of one rank, to the bit.

SmolLM2 has 9 query and 3 KV heads: on 2 ranks they are 3 + 6 and 1 + 2, on 4 ranks two of them share a KV head.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from runners import native_library
from stack import Stack, eventually
from tokenizers import Tokenizer

from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.sampling import Sampling

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
LENGTH = 16  # tokens of an answer
LONG = 64


class Alone:
    """The same model on one rank, in this process."""

    def __init__(self, model_dir: Path) -> None:
        settings = EngineSettings(model_dir, dtype="bfloat16", num_blocks=96, max_model_len=1024, threads=1)
        self.runner = NativeRunner(settings, library=native_library())
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    def answer(self, prompt: Sequence[int], count: int, fields: dict[str, Any]) -> str:
        sampling = Sampling(**fields)
        table = np.arange(96, dtype=np.int32)
        tokens, chunk, start = list(prompt), list(prompt), 0
        for index in range(count):
            history = np.asarray(tokens, np.uint32)
            draw = Draw(sampling, 0, index, history, len(prompt))
            step = SequenceStep(0, np.asarray(chunk, np.uint32), start, table, draw)
            (token,) = self.runner.execute(StepPlan((step,))).tokens
            assert token is not None
            start += len(chunk)
            chunk = [token]
            tokens.append(token)
        text: str = self._tokenizer.decode(tokens[len(prompt) :])
        return text


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> Iterator[Alone]:
    alone = Alone(model_dir)
    yield alone
    alone.runner.close()


# `make degrees` runs all pairs; elsewhere the unevenest stands for them, and one from more ranks to fewer.
ALL = [(1, 2), (1, 4), (4, 1), (4, 2), (2, 2), (4, 4)] if os.environ.get("KVFERRY_ALL_DEGREES") else []


@pytest.fixture(scope="module", params=[(2, 4), (2, 1), *ALL], ids=lambda pair: f"{pair[0]} to {pair[1]}")
def ranked(
    request: pytest.FixtureRequest, flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    native_library()  # or skip: the torch engine is not exact
    prefill, decode = map(str, request.param)
    degrees = ("--prefill-tensor-parallel-size", prefill, "--decode-tensor-parallel-size", decode)
    never_local = {"KVFERRY_LOCAL_PREFILL_THRESHOLD": "0"}
    stack = Stack(tmp_path_factory.mktemp("ranks"), *flags, *degrees, environ=never_local)
    try:
        yield stack.start()
    finally:
        stack.close()


def complete(stack: Stack, prompt: Sequence[int], count: int, fields: dict[str, Any]) -> str:
    body = {"model": "smollm2", "prompt": list(prompt), "max_tokens": count, "ignore_eos": True, **fields}
    with stack.http() as http:
        answer = http.post("/v1/completions", json=body, timeout=120).raise_for_status().json()
    text: str = answer["choices"][0]["text"]
    return text


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 40_000, length).tolist()


def pulled(stack: Stack) -> float:
    """Pulls that the decode worker has received."""
    worker = stack.worker("decode-0")
    assert worker is not None
    text = httpx.get(f"http://127.0.0.1:{worker['debug_port']}/metrics", trust_env=False).text
    line = next((line for line in text.splitlines() if line.startswith('kvferry_pull_total{outcome="received"}')), "0")
    return float(line.split()[-1])


def ranks_of(stack: Stack, name: str) -> list[int]:
    """Process ids of a worker's ranks but the first."""
    return sorted(pid for pid, line in stack.processes().items() if f"{name}-rank-" in line)


def test_unequal_degrees_say_what_one_rank_says(ranked: Stack, alone: Alone) -> None:
    """Prompts that cross the hand-off, in one frame and in several, greedy and drawn."""
    for seed, (length, fields) in enumerate(((40, GREEDY), (40, SEEDED), (600, GREEDY), (600, SEEDED))):
        prompt = prompt_of(length, seed)
        assert complete(ranked, prompt, LENGTH, fields) == alone.answer(prompt, LENGTH, fields), (length, fields)
    assert pulled(ranked) == 4
    degrees = {worker["name"]: worker["ranks"] for worker in ranked.workers()}
    assert all(len(ranks_of(ranked, name)) == ranks - 1 for name, ranks in degrees.items())
    status = ranked.command("status").stdout
    assert all(f"{name}: engine native on {ranks} ranks" in status for name, ranks in degrees.items() if ranks > 1)


@pytest.mark.parametrize(("role", "length"), [("prefill", 600), ("decode", 40)])
def test_a_killed_rank_costs_its_worker_and_no_token(ranked: Stack, alone: Alone, role: str, length: int) -> None:
    """While its worker computes the prompt, or streams: the worker ends, is started again, and the stream goes on."""
    name = f"{role}-0"
    ranks, worker = ranks_of(ranked, name), ranked.worker(name)
    assert worker is not None
    victims = ranks or [worker["pid"]]  # of a worker of one rank it is the worker
    prompt = prompt_of(length, 7)
    count = LENGTH if role == "prefill" else LONG
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": count, "ignore_eos": True, "stream": True, **GREEDY}
    text, events = "", 0
    with ranked.http() as http, http.stream("POST", "/v1/completions", json=body, timeout=120) as answer:
        if role == "prefill":
            os.kill(victims[-1], signal.SIGKILL)
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            text += httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
            events += 1
            if events == 4 and role == "decode":
                os.kill(victims[0], signal.SIGKILL)
    assert text == alone.answer(prompt, count, GREEDY)
    # The whole worker has ended, and another one is there with all of its ranks.
    again = eventually(lambda: (row := ranked.worker(name)) and row["pid"] != worker["pid"] and row)
    assert again["ranks"] == len(ranks) + 1
    eventually(lambda: len(ranks_of(ranked, name)) == len(ranks))
    assert not set(ranks) & set(ranks_of(ranked, name))
