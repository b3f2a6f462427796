"""Workers are added and drained under load: by hand, and by `kvferry autoscale`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from stack import KVFERRY, Stack, eventually

PATIENCE_S = 150.0
LENGTH = 400  # tokens: seconds of decoding


@pytest.fixture(scope="module")
def small(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One decode worker that prefills, too: the cheapest stack that can grow."""
    stack = Stack(tmp_path_factory.mktemp("small"), *flags, "--prefill", "0", "--decode", "1")
    try:
        yield stack.start()
    finally:
        stack.close()


def tell(stack: Stack) -> str:
    """One long greedy answer. Raises for anything but a whole one."""
    with OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.completions.create(
            model="smollm2", prompt="The river", temperature=0, max_tokens=LENGTH, extra_body={"ignore_eos": True}
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == LENGTH
    return answer.choices[0].text


def ready(stack: Stack) -> dict[str, dict[str, Any]]:
    return {worker["name"]: worker for worker in stack.workers() if worker["state"] == "ready"}


def test_a_worker_that_is_taken_away_finishes_or_hands_over_what_it_has(small: Stack) -> None:
    undisturbed = tell(small)
    assert small.command("scale").stdout == "prefill=0\ndecode=1\n"
    assert small.command("scale", "decode=2").stdout == "prefill=0\ndecode=2\n"
    added = eventually(lambda: ready(small).get("decode-1"), PATIENCE_S)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(tell, small) for _ in range(4)]
        eventually(lambda: ready(small)["decode-1"]["load"]["num_running"], PATIENCE_S)
        assert small.command("scale", "decode=1").stdout == "prefill=0\ndecode=1\n"
        assert [answer.result() for answer in answers] == [undisturbed] * 4
    eventually(lambda: added["pid"] not in small.processes(), PATIENCE_S)
    assert set(ready(small)) == {"decode-0"}
    assert small.command("scale", "decode=0").returncode == 1
    assert small.command("scale", "gateway=2").returncode == 2


def test_autoscale_adds_a_worker_under_load_and_drains_it_when_the_load_is_gone(small: Stack, tmp_path: Path) -> None:
    (tmp_path / "prefill.yaml").write_text("")
    # So small a share of the target that every stream wants a worker of its own.
    rules = "{max_replicas: 2, itl_share: 0.001, up_after_s: 0.5, down_after_s: 4}"
    (tmp_path / "decode.yaml").write_text(f"autoscale: {rules}\n")
    log = tmp_path / "autoscale.log"
    command = [KVFERRY, "autoscale", "--run-file", str(small.run_file), "--scaling-file", str(tmp_path)]
    with log.open("wb") as output:
        scaler = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=output, env=dict(os.environ))
    try:
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(tell, small) for _ in range(3)]
            added = eventually(lambda: ready(small).get("decode-1"), PATIENCE_S)
            assert len({answer.result() for answer in answers}) == 1
        eventually(lambda: added["pid"] not in small.processes(), PATIENCE_S)
        assert set(ready(small)) == {"decode-0"}
        scaler.send_signal(signal.SIGTERM)
        assert scaler.wait(30) == 0
    finally:
        scaler.kill()
        scaler.wait()
    said = log.read_text()
    assert said.count("scaling") >= 2, said
    assert "Traceback" not in said
