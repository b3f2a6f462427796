"""The whole stack as a user has it: real processes, real model, real bus, real data plane."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from pages import put, written
from stack import Stack, eventually

QUESTION = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_the_line_that_is_printed_works_when_it_is_pasted(stack: Stack) -> None:
    """And it is the one that the page shows."""
    (shown,) = written("README.md", "test_the_line_that_is_printed_works_when_it_is_pasted")
    line = put(shown, {"http://127.0.0.1:8000": stack.url})
    assert shlex.split(line) == shlex.split(stack.curl_command().replace("\\\n", ""))
    pasted = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120, check=True)
    events = [line.removeprefix("data: ") for line in pasted.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    assert len(text) > 20


def test_the_openai_client_gets_the_same_text_streamed_and_not(client: OpenAI) -> None:
    def ask() -> ChatCompletion:
        return client.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            temperature=0,
            max_tokens=24,  # type: ignore[arg-type]
        )

    ask()  # now both find the same prefix in the caches: in `fast` a prompt computed at one go may round otherwise
    whole = ask()
    stream = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=24, stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_the_same_seed_draws_the_same_text_and_another_seed_another(client: OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(
            model="smollm2", prompt="Once upon a time", temperature=1.0, seed=seed, max_tokens=24
        )
        return answer.choices[0].text

    draw(1)  # its prompt is in the caches from here on
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_model_is_listed_under_its_served_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]


def test_the_cluster_lists_each_worker(stack: Stack) -> None:
    workers = {worker["name"]: worker for worker in stack.workers()}
    assert set(workers) >= {"prefill-0", "decode-0"}
    for name in ("prefill-0", "decode-0"):
        worker = workers[name]
        assert worker["role"] == name.split("-")[0]
        assert worker["model"] == "smollm2"
        assert worker["pid"] in stack.processes()
        assert worker["transport"] in ("ucx", "tcp")
        assert worker["incarnation"]
        assert worker["load"]["free_blocks"] > 0
    assert workers["prefill-0"]["incarnation"] != workers["decode-0"]["incarnation"]


def test_chat_and_status_find_the_stack_by_its_run_file(stack: Stack) -> None:
    answer = stack.command("chat", "--max-tokens", "8", "--temperature", "0", "Say hello.")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    status = stack.command("status")
    assert status.returncode == 0, status.stderr
    rows = [line.split() for line in status.stdout.splitlines()]
    for worker in stack.workers():
        row = next(row for row in rows if row[0] == worker["name"])
        # Whole, though nobody watches: as many columns as the heading has, and none of them shortened.
        assert row[:6] == [str(worker[key]) for key in ("name", "role", "state", "pid", "model", "transport")]


def test_a_second_stack_on_the_same_run_file_is_refused(stack: Stack) -> None:
    other = stack.command("up", "--port", "0", "--model", stack.facts.model[0])
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "--run-file" in other.stderr


@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
def test_a_worker_that_is_killed_is_restarted_and_serves_again(stack: Stack, client: OpenAI, name: str) -> None:
    before = stack.worker(name)
    assert before is not None
    os.kill(before["pid"], signal.SIGKILL)

    def back() -> bool:
        worker = stack.worker(name)
        return worker is not None and worker["incarnation"] != before["incarnation"] and worker["state"] == "ready"

    eventually(back)
    answer = client.completions.create(model="smollm2", prompt="One, two,", temperature=0, max_tokens=4)
    assert answer.choices[0].text


def test_a_worker_that_is_drained_is_replaced(stack: Stack) -> None:
    before = stack.worker("decode-0")
    assert before is not None
    drained = stack.command("drain", "decode-0")
    assert drained.returncode == 0, drained.stderr
    eventually(lambda: (now := stack.worker("decode-0")) and now["incarnation"] != before["incarnation"])
    unknown = stack.command("drain", "decode-9")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)


def test_the_single_worker_baseline_serves_and_ctrl_c_leaves_nothing(baseline: Stack) -> None:
    assert [worker["role"] for worker in baseline.workers() if worker["role"] != "gateway"] == ["decode"]
    with OpenAI(base_url=f"{baseline.url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.completions.create(model="smollm2", prompt="One, two,", temperature=0, max_tokens=4)
    assert answer.choices[0].text
    assert len(baseline.processes()) == 4  # supervisor, nats-server, gateway, worker
    assert baseline.stop(signal.SIGINT) == 0, baseline.log.read_text()[-2000:]
    assert baseline.processes() == {}
    assert not baseline.run_file.exists()
    assert "Traceback" not in baseline.log.read_text()


def test_a_supervisor_that_is_killed_leaves_nothing(baseline: Stack) -> None:
    assert len(baseline.processes()) == 4
    baseline.stop(signal.SIGKILL)
    eventually(lambda: baseline.processes() == {})
