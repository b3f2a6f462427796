"""The console over a real stack: `kvferry up` with the real model, a real Chromium, and a worker that is killed.

The model's draws are greedy and its engine exact, so an answer has one right text, whatever happens to the workers.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from chromium import CHROMIUM, Chromium
from runners import native_library
from stack import Stack

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH"), pytest.mark.timeout(600)]

KEY: Final = "alpha"
BEARER: Final = {"authorization": f"Bearer {KEY}"}
QUESTION: Final = "Tell me a story of a ferry."  # the model goes on until its context is full
MAX_MODEL_LEN: Final = 384
NUM_CLIENTS: Final = 8
TRIES: Final = 5  # of a blow in mid-stream, which may fall when a fast engine is done

# From here on the page's changes are kept: what its status line said, the phases that each request was seen in, and
# the lengths that the answer had.
RECORD: Final = """(() => {
  window.told = [];
  window.phases = {};
  window.lengths = new Set();
  const look = () => {
    const status = document.getElementById("status").textContent;
    if (told.at(-1) !== status) told.push(status);
    for (const row of document.querySelectorAll("#requests tr")) {
      const [id, , phase] = Array.from(row.children, cell => cell.textContent);
      const seen = phases[id] ??= [];
      if (seen.at(-1) !== phase) seen.push(phase);
    }
    const answer = document.querySelector("#conversation .assistant");
    if (answer !== null) lengths.add(answer.textContent.length);
  };
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
  look();
})()"""
STATE: Final = f"fetch('console/state', {{ headers: {json.dumps(BEARER)} }}).then(response => response.json())"
ANSWER: Final = "document.querySelector('#conversation .assistant')?.textContent"
ANSWERED: Final = f"!document.getElementById('send').disabled && ({ANSWER} ?? 'nothing')"
TIMELINE: Final = "document.getElementById('timeline').textContent"
READY: Final = """[...document.querySelectorAll('#workers li')].filter(node =>
  /^\\S+ ready$/.test(node.querySelector('strong').parentNode.firstChild.textContent + ' ' +
                    node.querySelector('.load').textContent)).length === %d"""
CHAT_ROW: Final = "document.querySelector('#requests [aria-pressed=true]')?.closest('tr')"
PHASES: Final = "phases[document.getElementById('followed').textContent]"  # of the chat, which is followed
ON_DECODE: Final = f"({ANSWER} ?? '').length > 40 && {CHAT_ROW}?.children[3].textContent.split(' → ').at(-1)"


@dataclass
class Console:
    """The page over the stack."""

    page: Chromium
    url: str

    async def open(self) -> None:
        """Anew, without a conversation. Returns once all three workers are shown as ready."""
        await self.page.open(f"{self.url}/console")
        await self.page.value(RECORD)
        await self.page.until(READY % 3)

    async def ask(self) -> None:
        await self.page.value("document.getElementById('prompt').focus()")
        await self.page.type(QUESTION)
        assert await self.page.value("document.getElementById('prompt').value") == QUESTION
        await self.page.press("Enter")

    async def worker(self, name: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = (await self.page.value(STATE))["workers"]
        return next(row for row in rows if row["name"] == name)

    async def told(self) -> str:
        """All that the status line has said."""
        return ", ".join(await self.page.value("told"))

    async def replaced(self, before: dict[str, Any]) -> None:
        """Once the status line has said that the worker is gone, and that one of its name is ready."""
        name = before["name"]
        await self.page.until(f"/{name} is (gone|draining).*{name} is ready/.test(told.join())")
        await self.page.until(READY % 3)
        assert (await self.worker(name))["incarnation"] != before["incarnation"]


@pytest.fixture(scope="module")
def greedy_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, which recommends to draw no lots: the page names no temperature."""
    native_library()  # or skip: the torch engine is not exact
    folder = tmp_path_factory.mktemp("greedy")
    for file in model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    recommended = folder / "generation_config.json"
    settings = json.loads(recommended.read_text()) | {"temperature": 0.0}
    recommended.unlink()
    recommended.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def trio(greedy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One prefill and two decode workers."""
    folder = tmp_path_factory.mktemp("trio")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    stack = Stack(
        folder, "--model", str(greedy_model), "--served-model-name", "smollm2", "--threads", "1",
        "--max-model-len", str(MAX_MODEL_LEN), "--prefill", "1", "--decode", "2", "--api-key-file", str(keys),
        environ={"KVFERRY_LOCAL_PREFILL_THRESHOLD": "0"},  # no prompt is prefilled on a decode worker by choice
    )  # fmt: skip
    try:
        yield stack.start()
    finally:
        stack.close()


@pytest.fixture(scope="module")
def undisturbed(trio: Stack) -> str:
    """What the model answers while nothing happens."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}]}
    answer = httpx.post(f"{trio.url}/v1/chat/completions", json=body, headers=BEARER, timeout=300, trust_env=False)
    text = str(answer.raise_for_status().json()["choices"][0]["message"]["content"])
    assert len(text) > 400
    return text


@pytest.fixture
async def console(trio: Stack, tmp_path: Path) -> AsyncIterator[Console]:
    async with Chromium(tmp_path) as page:
        console = Console(page, trio.url)
        await page.open(f"{trio.url}/console")
        await page.until("document.querySelector('#status.problem')?.textContent.includes('key')")
        await page.value("document.getElementById('key').focus()")
        await page.type(KEY)
        await page.press("Enter")
        await console.open()
        yield console
    assert "Traceback" not in trio.log.read_text()


async def test_a_chat_streams_the_models_answer_into_the_page(console: Console, undisturbed: str) -> None:
    await console.ask()
    assert await console.page.until(ANSWERED) == undisturbed
    lengths = await console.page.value("[...lengths]")
    assert len(lengths) > 5, "it came in pieces"
    assert max(lengths) == len(undisturbed)
    await console.page.until(f"{TIMELINE}.includes('ended after')")
    assert (await console.page.value(PHASES))[-1] == "length"


async def test_requests_are_seen_to_move_from_prefill_to_decode(console: Console, trio: Stack) -> None:
    async with busy(trio):
        await console.page.until("document.querySelector('#flow [data-phase=prefill]').textContent > 0")
        await console.page.until("document.querySelector('#flow [data-phase=decode]').textContent > 0")
        moved = "Object.values(phases).some(seen => /(prefill|KV)[^,]*,decode.*,length/.test(seen.join()))"
        await console.page.until(moved)
    await console.page.until("document.getElementById('flow-title').textContent === 'Under way: 0'")


@asynccontextmanager
async def busy(stack: Stack) -> AsyncIterator[None]:
    """Clients that ask without a pause, each with prompts of its own."""

    async def ask(number: int, client: httpx.AsyncClient) -> None:
        for turn in range(1000):
            prompt = f"Client {number}, turn {turn}. " + "The ferry crosses the wide river. " * 30
            body = {"model": "smollm2", "prompt": prompt, "max_tokens": 80, "ignore_eos": True}
            (await client.post("/v1/completions", json=body)).raise_for_status()

    async with httpx.AsyncClient(base_url=stack.url, headers=BEARER, timeout=300, trust_env=False) as client:
        clients = [asyncio.create_task(ask(number, client)) for number in range(NUM_CLIENTS)]
        try:
            yield
        finally:
            for task in clients:
                assert not task.done(), task.result()
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


async def test_a_decode_worker_is_killed_in_mid_stream_and_the_page_shows_the_rest_from_another(
    console: Console, undisturbed: str
) -> None:
    for _ in range(TRIES):
        await console.ask()
        victim = await console.worker(await console.page.until(ON_DECODE))
        os.kill(victim["pid"], signal.SIGKILL)
        assert await console.page.until(ANSWERED) == undisturbed
        timeline = await console.page.until(f"{TIMELINE}.includes('ended after') && {TIMELINE}")
        phases = await console.page.value(PHASES)
        if "decode, attempt 2" in phases:
            break
        await console.open()  # it had said its last token, or was done again between two updates of the page
    steps = (
        "attempt 1 offered", "attempt 1 accepted", "attempt 1 lost: decode_gone", "attempt 2 offered",
        "attempt 2 accepted", "ended after",
    )  # fmt: skip
    places = [timeline.index(step) for step in steps]
    assert places == sorted(places)
    assert "attempt 3" not in timeline
    survivor = {"decode-0": "decode-1", "decode-1": "decode-0"}[victim["name"]]
    assert f"attempt 2 offered to prefill-0 and {survivor}:" in timeline
    assert "decode, attempt 2" in phases, "it was seen on its second way"
    assert phases[-1] == "length, attempt 2"
    assert await console.page.value("document.querySelector('#conversation .problem')") is None
    await console.replaced(victim)


async def test_the_button_drains_a_worker_in_mid_stream_and_another_takes_its_name(
    console: Console, undisturbed: str
) -> None:
    page = console.page
    await console.ask()
    drained = await console.worker(await page.until(ON_DECODE))
    await page.value(f"document.querySelector('[aria-label=\"Drain {drained['name']}\"]').focus()")
    await page.press("Enter")
    assert await page.value("document.getElementById('draining-name').textContent") == drained["name"]
    await page.value("document.getElementById('drain-yes').focus()")
    await page.press("Enter")
    assert await page.until(ANSWERED) == undisturbed
    await console.replaced(drained)
    assert f"{drained['name']} was asked to drain" in await console.told()
