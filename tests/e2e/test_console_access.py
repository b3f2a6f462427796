"""The console for everybody: with the keyboard alone, for a screen reader, in the dark, and on a phone.

Every key is one of a keyboard, every colour is what the browser has computed. The workers are scripted.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from chromium import CHROMIUM, Chromium
from contrast import MIN_LARGE, MIN_TEXT, contrast, ground_of, luminance
from scripted_worker import EOS, MODEL, Cluster, ScriptedWorker, completion, tokens_of

from kvferry.wire.orders import Drain
from kvferry.wire.work import Work
from kvferry_gateway.console.view import MAX_ENDED_SHOWN

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")

KEY: Final = "alpha"
MIN_TARGET_PX: Final = 24  # WCAG 2.2 AA, 2.5.8
PHONE_WIDTHS: Final = (360, 320)  # a phone; and what 1.4.10 asks for
MAX_STOPS: Final = 80
GREETING: Final = "Good day."
NUM_ROWS: Final = 20  # more than the table shows at once

FOCUSED: Final = """(() => {
  const node = document.activeElement;
  return node.id || node.ariaLabel || node.getAttribute("aria-labelledby") || node.textContent.trim();
})()"""

# How the focus shows: its outline, whether anything that scrolls or clips has cut that off, and whether anything lies
# over the middle of what has it.
RING: Final = """(() => {
  const node = document.activeElement, box = node.getBoundingClientRect(), style = getComputedStyle(node);
  const grown = parseFloat(style.outlineOffset) + parseFloat(style.outlineWidth);
  let whole = true;
  for (let up = node.parentElement; up !== document.body; up = up.parentElement) {
    const [frame, { overflowX, contain }] = [up.getBoundingClientRect(), getComputedStyle(up)];
    if (overflowX === "visible" && !/content|strict|paint/.test(contain)) continue;
    whole &&= box.left - grown >= frame.left && box.right + grown <= frame.right;
    whole &&= box.top - grown >= frame.top && box.bottom + grown <= frame.bottom;
  }
  const on = document.elementFromPoint(box.x + box.width / 2, box.y + Math.min(box.height, innerHeight) / 2);
  return {
    visible: node.matches(":focus-visible") && style.outlineStyle !== "none",
    width: parseFloat(style.outlineWidth), colour: style.outlineColor, whole, uncovered: node.contains(on),
  };
})()"""

# Every run of text that is painted, and every control: colour of the text (or of the control's edge), and its grounds
# from the innermost to the page's, of which the first that is not transparent lies behind it.
PAINTED: Final = """(() => {
  const grounds = node => {
    const found = [];
    for (; node !== null; node = node.parentElement) found.push(getComputedStyle(node).backgroundColor);
    return found;
  };
  const top = document.querySelector("dialog[open]") ?? document.body;
  const walker = document.createTreeWalker(top, NodeFilter.SHOW_TEXT);
  const texts = [], edges = [];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !node.checkVisibility({ visibilityProperty: true }) || node.disabled) continue;
    const style = getComputedStyle(node), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    texts.push({ text, colour: style.color, grounds: grounds(node), large });
  }
  for (const node of top.querySelectorAll("button:enabled, input, textarea, select")) {
    const style = getComputedStyle(node);
    if (parseFloat(style.borderTopWidth) === 0) continue;
    edges.push({ of: node.id || node.textContent, colour: style.borderTopColor, grounds: grounds(node.parentElement) });
  }
  return { texts, edges };
})()"""

# Boxes of what can be pressed, without links within a text.
TARGETS: Final = """[...document.querySelectorAll("button, input, select, textarea")]
  .filter(node => node.checkVisibility())
  .map(node => {
    const { width, height } = node.getBoundingClientRect();
    return { name: node.id || node.ariaLabel || node.textContent, width, height };
  })"""

# What does not fit into what holds it and cannot be scrolled to. Cells end in an ellipsis, the table scrolls.
CUT_OFF: Final = """[...document.querySelectorAll("header, header *, main, main *")]
  .filter(node => node.closest(".scroll, select, textarea, .blocks, .chart, svg, canvas") === null)
  .filter(node => node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== "inline")
  .map(node => node.id || node.className || node.tagName)"""


# Elements that would move over time.
MOVING: Final = """[...document.querySelectorAll("*")].map(node => getComputedStyle(node)).filter(style =>
  style.animationName !== "none" || style.transitionDuration !== "0s" || style.scrollBehavior !== "auto").length"""


@dataclass
class Scene:
    """A console in a browser, its key given, and what stands behind it."""

    cluster: Cluster
    page: Chromium
    prefill: ScriptedWorker
    decode: ScriptedWorker

    async def ask(self, name: str = "", **fields: Any) -> None:
        """A request of somebody else, to its end."""
        headers = {"authorization": f"Bearer {KEY}", **({"x-request-id": name} if name else {})}
        answer = await self.cluster.client.post("/v1/completions", json=completion(**fields), headers=headers)
        assert answer.status_code == 200, answer.text

    def script(self, text: str, *, ends: bool = True) -> None:
        """What every decode worker says from now on."""
        for worker in self.cluster.workers.values():
            worker.accepted = says(worker, text) if ends else hold_after(worker, text)

    async def focused(self) -> str:
        return str(await self.page.value(FOCUSED))

    async def stop_at(self, wanted: str) -> None:
        """Press Tab until the focus is there."""
        for _ in range(MAX_STOPS):
            if await self.focused() == wanted:
                return
            await self.page.press("Tab")
        raise AssertionError(f"Tab never comes to {wanted}")

    async def chat(self, text: str) -> None:
        """Write and send it in the chat box, with keys alone."""
        await self.stop_at("prompt")
        await self.page.type(text)
        await self.page.press("Enter")

    async def updated(self) -> None:
        """Two states of the gateway later."""
        before = await self.page.value("+document.getElementById('main').dataset.updates || 0")
        await self.page.until(f"+document.getElementById('main').dataset.updates >= {before + 2}")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    async with Cluster(tmp_path, api_key_file=keys) as cluster, Chromium(tmp_path / "profile") as page:
        prefill, decode = await cluster.pair()
        await page.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        await page.open(f"{cluster.url}/console")
        await page.until("document.querySelector('#status.problem')?.textContent.includes('key')")
        scene = Scene(cluster, page, prefill, decode)
        scene.script(GREETING)
        await scene.stop_at("key")
        await page.type(KEY)
        await page.press("Enter")
        await page.until("document.querySelectorAll('#workers li').length === 2")
        yield scene


def says(worker: ScriptedWorker, text: str) -> Any:
    return lambda work: worker.say(work, [*tokens_of(text), EOS])


def hold_after(worker: ScriptedWorker, text: str) -> Any:
    """Say this, and nothing more."""

    def speak(work: Work) -> None:
        tokens = tokens_of(text)
        for index, token in enumerate(tokens):
            worker.publish(work, [(index, token)])
        worker.hold(work, "running", len(tokens))

    return speak


# -- the keyboard ----------------------------------------------------------------------------------------------


async def test_tab_comes_to_everything_in_the_order_of_the_page_and_shows_where_it_is(scene: Scene) -> None:
    page = scene.page
    requests = [f"request-{number}" for number in range(NUM_ROWS)]
    for request in requests:
        await scene.ask(request)
    await page.open(f"{scene.cluster.url}/console")  # so that Tab begins at its top
    await page.until(f"document.querySelectorAll('#requests tr').length === {NUM_ROWS}")
    ground = await page.value("getComputedStyle(document.querySelector('section')).backgroundColor")
    wanted = [
        "Skip to the cluster", "key", "Use", "Drain prefill-0", "Drain decode-0", "model", "conversation", "prompt",
        "send", "requests-title", *reversed(requests),
    ]  # fmt: skip
    for shift, stops in ((False, wanted), (True, wanted[-2::-1])):  # to the last one, and back to the first
        for stop in stops:
            await page.press("Tab", shift=shift)
            assert await scene.focused() == stop
            ring = await page.value(RING)
            assert ring["visible"], stop
            assert ring["width"] >= 2, stop
            assert ring["whole"], stop
            assert ring["uncovered"], stop
            assert contrast(ring["colour"], [ground]) >= MIN_LARGE, stop


async def test_a_chat_is_written_sent_and_stopped_with_keys_and_the_focus_stays(scene: Scene) -> None:
    page = scene.page
    await scene.stop_at("prompt")
    await page.type("Hi,")
    await page.press("Enter", shift=True)
    await page.type("you")
    assert await page.value("document.getElementById('prompt').value") == "Hi,\nyou"
    await page.press("Enter")
    await page.until("document.querySelector('#conversation .assistant')?.textContent === 'Good day.'")
    assert await page.value("document.querySelector('#conversation .user').textContent") == "Hi,\nyou"
    assert await scene.focused() == "prompt"

    await page.until("!document.getElementById('send').disabled")
    scene.script("Well", ends=False)
    await page.type("Go on")
    await scene.stop_at("send")
    await page.press("Enter")
    await page.until("[...document.querySelectorAll('#conversation .assistant')].at(-1).textContent === 'Well'")
    assert await scene.focused() == "prompt", "what sends cannot be pressed now, and has not kept the focus"
    await scene.stop_at("stop")
    await page.press("Enter")
    await page.until("document.querySelector('#conversation .problem')?.textContent === 'Stopped.'")
    await page.until("document.getElementById('stop').disabled")
    assert await scene.focused() == "prompt"


async def test_a_request_is_opened_with_enter_and_keeps_the_focus_while_rows_come_and_go(scene: Scene) -> None:
    page = scene.page
    scene.script("x", ends=False)
    names = ("oldest", "middle", "newest")
    asked = []
    for number, name in enumerate(names, 1):
        asked.append(asyncio.create_task(scene.ask(name)))
        await page.until(f"document.querySelectorAll('#requests tr').length === {number}")
    works = dict(zip(names, scene.decode.works, strict=True))
    await scene.stop_at("middle")
    await page.press("Enter")
    await page.until("document.getElementById('followed').textContent === 'middle'")
    await page.until("document.getElementById('timeline').textContent.includes('attempt 1 accepted')")
    assert await page.value("document.activeElement.ariaPressed") == "true"

    for name in ("oldest", "middle"):  # goes below those that are under way
        scene.decode.publish(works[name], end=("stop", 1))
        await page.until(f"document.querySelector('#requests tr.over button')?.textContent === '{name}'")
        assert await scene.focused() == "middle"
    scene.decode.publish(works["newest"], end=("stop", 1))
    await asyncio.gather(*asked)
    scene.script("x")
    for number in range(MAX_ENDED_SHOWN):
        await scene.ask(f"later-{number}")
    await page.until("!document.getElementById('requests').textContent.includes('middle')")
    assert await scene.focused() == "requests-title", "what held the row that is gone has the focus"


async def test_escape_keeps_the_worker_and_gives_the_focus_back(scene: Scene) -> None:
    page, decode = scene.page, scene.decode
    await scene.stop_at("Drain decode-0")
    await page.press("Enter")
    assert await scene.focused() == "drain-no", "the harmless button comes first"
    for expected in ("drain-yes", "drain-no"):  # the page behind it cannot be reached
        await scene.stop_at(expected)
        assert await page.value("document.activeElement.closest('dialog') !== null")
    await page.press("Escape")
    assert not await page.value("document.getElementById('draining').open")
    assert await scene.focused() == "Drain decode-0"
    await page.press(" ")
    await scene.stop_at("drain-yes")
    assert not decode.got(Drain)
    await page.press("Enter")
    assert (await decode.wait_for(Drain)).worker_incarnation == decode.incarnation
    assert await scene.focused() == "Drain decode-0"
    decode.state = "draining"
    await page.until("document.querySelector('[aria-label=\"Drain decode-0\"]').disabled")
    await scene.updated()
    assert await scene.focused() == "workers", "a button that cannot be pressed has not kept the focus"


async def test_a_dialog_about_a_worker_that_has_gone_gives_the_focus_to_the_others(scene: Scene) -> None:
    page = scene.page
    await scene.stop_at("Drain decode-0")
    await page.press("Enter")
    await scene.decode.exit("crashed")
    await page.until("document.querySelectorAll('#workers li').length === 1")
    assert await scene.focused() == "drain-no", "what happens behind it takes nothing from the dialog"
    await page.press("Escape")
    await page.until("!document.getElementById('draining').open")
    await scene.updated()
    assert await scene.focused() == "workers"


# -- a screen reader -------------------------------------------------------------------------------------------


async def test_an_answer_is_whole_as_soon_as_it_is_said_to_be(scene: Scene) -> None:
    """The page writes with its frames; here none comes any more, as in a tab that is out of sight."""
    page = scene.page
    await page.until("document.getElementById('model').value")
    await page.value("window.requestAnimationFrame = () => 0")
    await scene.chat("Hi")
    await page.until("document.getElementById('conversation').ariaBusy === 'false'")
    assert await page.value("document.querySelector('#conversation .assistant').textContent") == GREETING


async def test_a_screen_reader_is_told_names_roles_and_news_and_which_column_a_cell_is_of(scene: Scene) -> None:
    page = scene.page
    await scene.ask("first")
    scene.script("Well", ends=False)
    await scene.chat("Go on")
    await page.until("document.querySelector('#conversation .assistant')?.textContent === 'Well'")
    await page.until("document.querySelectorAll('#requests tr').length === 2")
    nodes = await page.tree()
    named = {(role(node), name(node)) for node in nodes}
    assert named >= {
        ("link", "Skip to the cluster"), ("textbox", "Key"), ("button", "Use"), ("textbox", "Message"),
        ("button", "Send"), ("button", "Stop"), ("combobox", "Model"), ("button", "Drain decode-0"),
        ("log", "Conversation"), ("table", "Requests"), ("region", "Requests"), ("region", "Workers"),
        ("region", "Chat"), ("button", "first"),
    }  # fmt: skip
    operable = {"button", "textbox", "combobox", "link"}
    assert all(name(node) for node in nodes if role(node) in operable | {"image", "region", "table", "log"})
    assert {"banner", "main", "status"} <= {role(node) for node in nodes}
    assert len([node for node in nodes if role(node) == "list"]) >= 2, "the workers, and the timeline"
    for live, wanted in {"status": "polite", "log": "polite"}.items():
        (node,) = (node for node in nodes if role(node) == live)
        assert facts(node)["live"] == wanted
    log = next(node for node in nodes if role(node) == "log")
    assert facts(log)["busy"] == 1, "an answer is read once it is whole"
    charts = [name(node) for node in nodes if role(node) == "image"]
    assert any(text.startswith("Time to first token") and "of 1" in text for text in charts), charts
    assert any("blocks" in text for text in charts)

    by_id = {node["nodeId"]: node for node in nodes}
    rows = [node for node in nodes if role(node) == "row"]
    heads, *others = [[by_id[child] for child in row["childIds"] if child in by_id] for row in rows]
    assert [role(head) for head in heads] == ["columnheader"] * 7
    assert [name(head) for head in heads] == ["Request", "Model", "Phase", "Workers", "Prompt", "Tokens", "Seconds"]
    assert len(others) == 2
    for cells in others:
        assert [role(cell) for cell in cells] == ["rowheader", *["cell"] * 6], "the first names the row"
    first = next(cells for cells in others if name(cells[0]) == "first")
    assert [name(cell) for cell in first[1:3]] == [MODEL, "stop"]
    assert (name(first[5]), re.fullmatch(r"\d+\.\d\d", name(first[6])) is not None) == ("10", True)


async def test_each_cell_stands_below_its_head(scene: Scene) -> None:
    """The rows are grids: a cell too many would be on a line that nobody sees."""
    await scene.ask("first")
    await scene.page.until("document.querySelectorAll('#requests tr').length === 1")
    boxes = await scene.page.value(
        "[...document.querySelectorAll('table tr')].map(row => [row, ...row.children].map(node => {"
        " const box = node.getBoundingClientRect(); return [box.left, box.right, box.top, box.bottom]; }))"
    )
    for row, *cells in boxes:
        assert all(row[2] <= cell[2] and cell[3] <= row[3] for cell in cells)
        assert all(left[1] <= right[0] for left, right in pairwise(cells))
    heads, first = boxes[0][1:], boxes[1][1:]
    assert [head[:2] for head in heads] == [cell[:2] for cell in first]


# -- light and dark --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_stands_out_from_its_ground(scene: Scene, scheme: str) -> None:
    page = scene.page
    await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await show_everything(scene)
    painted = await page.value(PAINTED)
    shown = {text["text"] for text in painted["texts"]}
    assert {"Good day.", "draining", "Stopped.", "first", "stop", "KV on its way"} <= shown
    await page.value("document.querySelector('[aria-label=\"Drain decode-0\"]').click()")
    dialog = await page.value(PAINTED)
    assert {"Keep it", "Drain"} <= {text["text"] for text in dialog["texts"]}
    texts = [*painted["texts"], *dialog["texts"]]
    for text in texts:
        least = MIN_LARGE if text["large"] else MIN_TEXT
        assert contrast(text["colour"], text["grounds"]) >= least, text
    for edge in [*painted["edges"], *dialog["edges"]]:
        assert contrast(edge["colour"], edge["grounds"]) >= MIN_LARGE, edge
    lightest = luminance(ground_of(texts[0]["grounds"]))
    assert lightest > 0.8 if scheme == "light" else lightest < 0.05


async def show_everything(scene: Scene) -> None:
    """Every colour that the page has: of an answer, an error, a worker that leaves, requests that run and ended."""
    page = scene.page
    await scene.ask("first")
    await scene.chat("Hi")
    await page.until("document.querySelector('#conversation .assistant')?.textContent === 'Good day.'")
    await page.until("!document.getElementById('send').disabled")
    scene.script("Well", ends=False)
    await scene.chat("Go on")
    await page.until("[...document.querySelectorAll('#conversation .assistant')].at(-1).textContent === 'Well'")
    await page.value("document.getElementById('stop').click()")
    await page.until("document.querySelector('#conversation .problem') !== null")
    scene.prefill.state = "draining"
    await page.until("document.querySelector('#workers .not-ready')?.textContent === 'draining'")
    await page.until("document.getElementById('timeline').textContent.includes('attempt 1 accepted')")


def test_contrast_is_computed_as_wcag_has_it() -> None:
    assert contrast("rgb(0, 0, 0)", ["rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"]) == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", ["rgb(255, 255, 255)"]) == pytest.approx(4.54, abs=0.01)


# -- a phone ---------------------------------------------------------------------------------------------------


async def test_a_phone_shows_many_workers_and_long_names_without_scrolling_sideways(scene: Scene) -> None:
    page, cluster = scene.page, scene.cluster
    long = "w" + "orker" * 12  # a word that has no place to be broken
    for number in range(12):
        await cluster.worker("decode", f"{long}-{number}")
    scene.script(GREETING)
    for number in range(20):
        await scene.ask(f"request{'of' * 50}{number}")
    await show_everything(scene)
    await page.until("document.querySelectorAll('#workers li').length === 14")
    await page.until("document.querySelectorAll('#requests tr').length >= 20")
    await page.value("document.querySelector('#requests tr:last-child button').click()")
    await page.until("document.getElementById('followed').textContent.startsWith('requestof')")
    for width in PHONE_WIDTHS:
        await page.call("Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=2, mobile=True)
        assert await page.value("document.documentElement.scrollWidth") <= width
        assert await page.value("innerWidth") == width, "the page was not made smaller to fit"
        assert await page.value(CUT_OFF) == [], width
        await check_targets(page)
        await page.value("document.querySelector('#workers li:last-child button').click()")
        left, right = await page.value(
            "(({left, right}) => [left, right])(document.getElementById('draining').getBoundingClientRect())"
        )
        assert 0 <= left < right <= width
        assert await page.value("(node => node.scrollWidth <= node.clientWidth)(document.getElementById('draining'))")
        await check_targets(page)
        await page.press("Escape")
    # The table is wider than a phone, and scrolls by itself.
    assert await page.value("(node => node.scrollWidth > node.clientWidth)(document.querySelector('.scroll'))")


async def check_targets(page: Chromium) -> None:
    targets = await page.value(TARGETS)
    assert len(targets) > 8
    small = [target for target in targets if min(target["width"], target["height"]) < MIN_TARGET_PX]
    assert small == []


async def test_nothing_on_the_page_moves_by_itself(scene: Scene) -> None:
    """So there is nothing that `prefers-reduced-motion` would have to stop."""
    await show_everything(scene)
    assert await scene.page.value(MOVING) == 0
    assert await scene.page.value("document.getAnimations().length") == 0


# -- nodes of the accessibility tree ---------------------------------------------------------------------------


def role(node: dict[str, Any]) -> str:
    return str(node["role"]["value"])


def name(node: dict[str, Any]) -> str:
    return str(node.get("name", {}).get("value", ""))


def facts(node: dict[str, Any]) -> dict[str, Any]:
    return {fact["name"]: fact["value"]["value"] for fact in node["properties"]}
