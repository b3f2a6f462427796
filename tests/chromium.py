"""A headless Chromium, spoken to in the DevTools protocol through its pipe: JSON texts, each ended by a zero byte.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_S = 120.0
MAX_MESSAGE_BYTES = 64 << 20
KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}  # of keys that are no letters: Windows' numbers
SHIFT = 8
HIGH = 20  # descriptors from here on are in nobody's way: Chromium reads 3 and writes 4

# Resolves once `expression` is true; looks again whenever the document changes.
WAIT = """new Promise(resolve => {
  const observer = new MutationObserver(() => look());
  const look = () => { const value = (%s); if (value) { observer.disconnect(); resolve(value); } };
  observer.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
  look();
})"""

PARSED = """new Promise(resolve => {
  if (document.readyState !== "loading") resolve();
  else document.addEventListener("DOMContentLoaded", () => resolve());
})"""


class Chromium:
    """One browser with one page. `profile`: an empty folder of its own."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: list[dict[str, Any]] = []  # of a trace
        self._traced = asyncio.Event()
        self._session: str | None = None
        self._number = 0

    async def __aenter__(self) -> Chromium:
        assert CHROMIUM is not None
        theirs_in, ours_out = _high_pipe()
        ours_in, theirs_out = _high_pipe()
        self._process = await asyncio.create_subprocess_exec(
            "/bin/bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", CHROMIUM,
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={self._profile}", "--remote-debugging-pipe", "about:blank",
            pass_fds=(theirs_in, theirs_out), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader(limit=MAX_MESSAGE_BYTES)
        source, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), os.fdopen(ours_in, "rb")
        )
        self._sink, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(ours_out, "wb"))
        self._listening = asyncio.create_task(self._listen())
        self._source = source
        targets = (await self.call("Target.getTargets"))["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = await self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._process.terminate()
        await asyncio.wait_for(self._process.wait(), PATIENCE_S)
        await self._listening
        self._sink.close()
        self._source.close()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Fails the test for an error of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith(("Target.", "Tracing.")):
            message["sessionId"] = self._session
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        self._sink.write(json.dumps(message).encode() + b"\0")
        result = await asyncio.wait_for(answer, PATIENCE_S)
        assert "error" not in result, (method, result)
        found: dict[str, Any] = result["result"]
        return found

    async def open(self, url: str) -> None:
        """Returns once the document is parsed."""
        await self.call("Page.navigate", url=url)
        await self.value(PARSED)

    async def value(self, expression: str) -> Any:
        """What it comes to in the page; of a promise, what that resolves to."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> Any:
        """The first true value of what stands in the page."""
        return await self.value(WAIT % expression)

    async def press(self, key: str, *, shift: bool = False) -> None:
        """A key of the keyboard goes down and up: a character, or a name of `KEY_CODES`. Returns once the page has
        dealt with it."""
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = KEY_CODES.get(key) or (ord(key.upper()) if key.isalnum() else 0)  # 46, a dot, would delete
        event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def type(self, text: str) -> None:
        for character in text:
            await self.press(character)

    async def tree(self) -> list[dict[str, Any]]:
        """What a screen reader is told: the nodes of the accessibility tree that are not ignored, in order."""
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        return [node for node in nodes if not node["ignored"]]

    async def start_trace(self) -> None:
        self._events.clear()
        self._traced.clear()
        categories = "toplevel,devtools.timeline,disabled-by-default-devtools.timeline"
        await self.call("Tracing.start", traceConfig={"includedCategories": categories.split(",")})

    async def end_trace(self) -> list[dict[str, Any]]:
        """The trace's events, in the form of `chrome://tracing`."""
        await self.call("Tracing.end")
        await asyncio.wait_for(self._traced.wait(), PATIENCE_S)
        return self._events

    async def _listen(self) -> None:
        while True:
            try:
                text = await self._reader.readuntil(b"\0")
            except asyncio.IncompleteReadError:
                break
            message = json.loads(text[:-1])
            answer = self._answers.pop(message.get("id"), None)
            if answer is not None:
                if not answer.done():
                    answer.set_result(message)
            elif message.get("method") == "Tracing.dataCollected":
                self._events += message["params"]["value"]
            elif message.get("method") == "Tracing.tracingComplete":
                self._traced.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the browser has ended"))


def _high_pipe() -> tuple[int, int]:
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, HIGH) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
