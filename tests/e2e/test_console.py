"""The console in a real Chromium, served by a real gateway; its workers are scripted: a test says what happens."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from chromium import CHROMIUM, Chromium
from scripted_worker import EOS, Cluster, ScriptedWorker, completion, tokens_of

from kvferry.wire.beats import Load
from kvferry.wire.fields import pack_tokens
from kvferry.wire.orders import Drain
from kvferry.wire.tokens import Spent, TokenBatch
from kvferry.wire.work import DecodeRequest, PrefillRequest, Work

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")

NUM_REQUESTS, PROMPTS_A_REQUEST = 10, 20
NUM_STREAMS = NUM_REQUESTS * PROMPTS_A_REQUEST
NUM_UPDATES = 24
MAX_UPDATE_MS = 8.0  # of script and layout
MAX_TASK_MS = 50.0
# None of these contains another: a timer, a frame's script, the reading of an answer, and what follows from them.
SCRIPT_AND_LAYOUT = {"TimerFire", "FireAnimationFrame", "SimpleWatcher::OnHandleReady", "UpdateLayoutTree", "Layout"}

FLOW = "document.querySelector('#flow [data-phase=%s]').textContent === '%d'"
NAMES = "[...document.querySelectorAll('#workers strong')].map(node => node.textContent).sort().join()"
UPDATES = "+document.getElementById('main').dataset.updates"
STAGES = "[...document.querySelectorAll('#stages li')].map(node => node.textContent).join('; ')"
TIMELINE = "document.getElementById('timeline').textContent"


def publish_all(worker: ScriptedWorker, works: list[Work], index: int) -> None:
    """One token for each, in one batch."""
    batch = TokenBatch(
        worker.incarnation, worker.seq, pack_tokens([work.stream_id for work in works]),
        pack_tokens([index] * len(works)), pack_tokens(tokens_of("x") * len(works)),
    )  # fmt: skip
    worker.seq += 1
    worker.send(works[0].gateway, worker._codecs.to_gateway.encode(batch))


async def test_requests_move_a_chat_streams_and_a_worker_that_is_lost_shows(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\n")
    async with Cluster(tmp_path, api_key_file=keys) as cluster, Chromium(tmp_path / "profile") as page:
        prefill, decode = await cluster.pair()
        await page.open(f"{cluster.url}/console")
        await page.until("document.querySelector('#status.problem')?.textContent.includes('key')")
        await page.value("document.getElementById('key').value = 'alpha'; document.forms.access.requestSubmit()")
        await page.until(f"{NAMES} === 'decode-0,prefill-0'")
        decode.load = Load(free_blocks=16)
        await page.until("document.querySelector('#workers .blocks[title^=\"48 of 64\"]') !== null")

        decode.accepted = lambda work: decode.hold(work, "opening", 0)
        await page.value("document.getElementById('prompt').value = 'Hello?'; document.forms.chat.requestSubmit()")
        work = (await prefill.wait_for(PrefillRequest)).work
        await page.until(FLOW % ("prefill", 1))
        answer = tokens_of("Good day.")
        prefill.publish(work, [(0, answer[0])])
        await page.until(FLOW % ("kv", 1))
        await page.until("document.querySelector('#conversation .assistant').textContent === 'G'")
        decode.hold(work, "running", 1)
        await page.until(FLOW % ("decode", 1))

        second = await cluster.worker("decode", "decode-1")
        await page.until("document.getElementById('status').textContent.includes('decode-1 is ready')")
        second.accepted = lambda work: second.say(work, [*answer, EOS])
        await decode.exit("crashed")
        await page.until("document.querySelector('#conversation .assistant').textContent === 'Good day.'")
        await page.until(f"{TIMELINE}.includes('lost: decode_gone')")
        told = await page.until(f"{TIMELINE}.includes('ended after') && {TIMELINE}")
        assert told.index("attempt 1 offered") < told.index("attempt 1 lost") < told.index("attempt 2 offered")
        await page.until("document.getElementById('requests').textContent.includes('stop, attempt 2')")
        await page.until(f"{NAMES} === 'decode-1,prefill-0'")
        assert "of 1" in await page.until("document.getElementById('ttft-text').textContent")

        await page.value("document.querySelector('[aria-label=\"Drain decode-1\"]').click()")
        assert await page.value("document.activeElement.closest('dialog') !== null"), "the dialog takes the focus"
        assert not second.got(Drain)
        await page.value("document.getElementById('drain-yes').click()")
        assert (await second.wait_for(Drain)).worker_incarnation == second.incarnation
        await check_it_is_for_everybody(page)


# The colour of the middle of a cell in the first map, and that of a state in the key below the workers.
CELL = """(() => {
  const map = document.querySelector('.blocks'), columns = map.width / 8;
  const [x, y] = [%d %% columns * 8 + 3, Math.floor(%d / columns) * 8 + 3];
  const [red, green, blue, alpha] = map.getContext('2d').getImageData(x, y, 1, 1).data;
  return alpha ? `rgb(${red}, ${green}, ${blue})` : '';
})()"""
KEY = "getComputedStyle(document.querySelector('#pool-key [data-state=%s]')).color"


async def test_a_pool_is_drawn_block_by_block_in_the_colours_of_its_key(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster, Chromium(tmp_path / "profile") as page:
        worker = await cluster.worker("decode", "decode-0")
        blocks = {"running": 24, "held": 10, "fetching": 0, "reserved": 1, "cached": 9, "free": 20}
        worker.load = Load(free_blocks=29, blocks=blocks)
        await page.open(f"{cluster.url}/console")
        label = await page.until("document.querySelector('.blocks')?.title")
        assert label == (
            "35 of 64 blocks held: 24 running, 10 held for a hand-off, 1 reserved, 9 cached, 20 free"
        )  # in the order of the map
        assert await page.value("document.querySelector('.blocks').ariaLabel") == label
        assert await page.value("document.querySelector('.counts').textContent") == label
        for scheme in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            await page.call("Emulation.setEmulatedMedia", features=[feature])
            await page.until(f"{CELL % (0, 0)} === {KEY % 'running'}")
            drawn = [await page.value(CELL % (cell, cell)) for cell in range(65)]
            colours = {state: await page.value(KEY % state) for state in blocks}
            wanted = [colours[state] for state, count in blocks.items() for _ in range(count)]
            assert drawn == [*wanted, ""]
            assert len(set(colours.values())) == len(colours)
        worker.load = Load(free_blocks=64, blocks={"free": 62, "of a later version": 2})
        await page.until("document.querySelector('.blocks').title.includes('2 of a later version, 62 free')")


LAYOUT = "import('/console/pool.js').then(pool => pool.layout(%s, %d))"


async def test_a_state_that_has_blocks_is_seen_in_the_map_of_a_large_pool(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster, Chromium(tmp_path / "profile") as page:
        await page.open(f"{cluster.url}/console")
        for rows, total, wanted in (
            ([["running", 2], ["free", 1]], 3, [["running", 0, 2], ["free", 2, 3]]),
            ([["running", 1500], ["free", 1500]], 3000, [["running", 0, 256], ["free", 256, 512]]),
            (
                [["running", 1], ["held", 1], ["cached", 99997], ["free", 1]], 100_000,
                [["running", 0, 1], ["held", 1, 2], ["cached", 2, 511], ["free", 511, 512]],
            ),
            ([["free", 100_000]], 100_000, [["free", 0, 512]]),
        ):  # fmt: skip
            assert await page.value(LAYOUT % (json.dumps(rows), total)) == wanted


PHASE = "document.querySelector('#requests td:nth-child(3)')?.textContent === '%s'"


async def test_a_request_tells_how_far_it_is_and_where_its_time_went(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster, Chromium(tmp_path / "profile") as page:
        prefill, decode = await cluster.pair()
        prefill.accepted = lambda work: prefill.hold(work, "computing", 0, (1024, 4096))
        decode.accepted = lambda work: decode.hold(work, "fetching", 0, (1, 3))
        asked = asyncio.create_task(cluster.client.post("/v1/completions", json=completion("hello")))
        work = (await prefill.wait_for(PrefillRequest)).work
        await page.open(f"{cluster.url}/console")
        await page.until(PHASE % "prefill 1,024 of 4,096")
        await page.value("document.querySelector('#requests button').click()")
        await page.until(f"{STAGES}.startsWith('placing')")
        token = tokens_of("x")[0]
        prefill.publish(work, [(0, token)], spent=Spent(work.stream_id, 0.001, 0.002))
        await page.until(PHASE % "KV 33 %")
        await page.until(f"{STAGES}.includes('KV transfer')")
        decode.publish(work, [(0, token), (1, token)], spent=Spent(work.stream_id, 0.0, fetching_s=0.01, step_s=0.003))
        decode.publish(work, end=("length", 2))
        assert (await asked).status_code == 200
        await page.until(PHASE % "length")
        told = await page.until(f"{STAGES}.includes('decode') && {STAGES}")
        names = ["placing", "queue 1.0 ms", "prefill 2.0 ms", "messages", "KV transfer", "first step 3.0 ms", "decode"]
        lines = told.split("; ")
        assert len(lines) == len(names)
        assert all(line.startswith(name) for line, name in zip(lines, names, strict=True)), lines
        widths = await page.value("[...document.querySelectorAll('#stages-bar span')].map(node => node.offsetWidth)")
        shares = [int(line.split()[-2]) for line in lines]
        assert [round(100 * width / sum(widths)) for width in widths] == pytest.approx(shares, abs=2)


async def check_it_is_for_everybody(page: Chromium) -> None:
    """Whatever can be operated has a name; a phone shows it without scrolling sideways; it is dark in the dark."""
    nodes: list[dict[str, Any]] = (await page.call("Accessibility.getFullAXTree"))["nodes"]
    operable = [n for n in nodes if n.get("role", {}).get("value") in ("button", "textbox") and not n["ignored"]]
    assert len(operable) > 4
    assert all(node["name"]["value"] for node in operable)
    roles = {node.get("role", {}).get("value") for node in nodes}
    assert {"banner", "main", "status", "log", "table", "heading"} <= roles
    await page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert await page.value("document.documentElement.scrollWidth") <= 360
    ground = "getComputedStyle(document.body).backgroundColor"
    shades = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await page.call("Emulation.setEmulatedMedia", features=[feature])
        shades.append(sum(map(int, (await page.value(ground)).strip("rgb()").split(","))))
    assert shades[0] > 600 > 150 > shades[1]


async def test_an_update_with_200_streams_costs_the_page_no_more_than_8_ms(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster, Chromium(tmp_path / "profile") as page:
        _, decode = await cluster.pair()
        body = completion(["hello"] * PROMPTS_A_REQUEST, max_tokens=200)
        post = cluster.client.post
        asked = [asyncio.create_task(post("/v1/completions", json=body, timeout=None)) for _ in range(NUM_REQUESTS)]
        await decode.wait_for(DecodeRequest, NUM_STREAMS)
        works = decode.works
        await page.open(f"{cluster.url}/console")
        publish_all(decode, works, 0)
        publish_all(decode, works, 1)
        await page.until(FLOW % ("decode", NUM_STREAMS))
        await page.value("document.querySelector('#requests button').click()")
        await page.until(f"{TIMELINE}.includes('first token')")
        before = await page.value(UPDATES)
        await page.start_trace()
        for index in range(2, 2 + NUM_UPDATES):
            decode.load = Load(free_blocks=64 - index, blocks={"running": index, "cached": 8, "free": 56 - index})
            publish_all(decode, works, index)
            shown = f"document.querySelector('#requests tr:last-child td:nth-child(6)').textContent === '{index + 1}'"
            await page.until(shown)
        num_updates = await page.value(UPDATES) - before
        updates_ms, longest_ms = main_thread_ms(await page.end_trace())
        for work in works:
            decode.publish(work, end=("stop", 2 + NUM_UPDATES))
        assert {(await answer).status_code for answer in asked} == {200}
    assert num_updates >= NUM_UPDATES
    assert len(updates_ms) >= 20
    assert median(updates_ms) <= MAX_UPDATE_MS, updates_ms
    assert longest_ms <= MAX_TASK_MS


def main_thread_ms(events: list[dict[str, Any]]) -> tuple[list[float], float]:
    """(script and layout of each update, longest task) of the page's main thread, in its own time. An update begins
    with the timer that asks for the state."""
    renderers = {(e["pid"], e["tid"]) for e in events if e.get("args", {}).get("name") == "CrRendererMain"}
    drawn = Counter((e["pid"], e["tid"]) for e in events if e["name"] == "FireAnimationFrame")
    page = max(renderers, key=lambda thread: drawn[thread])  # the browser loads a page of its own, too
    timed = [e for e in events if (e["pid"], e["tid"]) == page and "tdur" in e]
    updates: list[float] = []
    for event in sorted(timed, key=lambda e: e["ts"]):
        if event["name"] == "TimerFire":
            updates.append(0.0)
        if event["name"] in SCRIPT_AND_LAYOUT and updates:
            updates[-1] += event["tdur"] / 1000
    assert {event["name"] for event in timed} >= SCRIPT_AND_LAYOUT, "the trace has lost its names"
    return updates, max(event["tdur"] / 1000 for event in timed if event["name"] == "RunTask")
