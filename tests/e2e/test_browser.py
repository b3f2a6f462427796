"""A page's `fetch` against the real stack, in a real Chromium, from another origin."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from stack import Stack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

PAGE = """<!doctype html><meta charset="utf-8"><title>kvferry</title><script>
async function main() {
  const body = {model: "smollm2", stream: true, max_tokens: 300, ignore_eos: true, temperature: 0,
                messages: [{role: "user", content: "Say hello in one short sentence."}]};
  const response = await fetch("GATEWAY/v1/chat/completions", {method: "POST",
      headers: {"content-type": "application/json"}, body: JSON.stringify(body)});
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "", text = "", reads = 0, done = false;
  for (;;) {
    const part = await reader.read();
    if (part.done) break;
    reads += 1;
    buffered += part.value;
    const events = buffered.split("\\n\\n");
    buffered = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") { done = true; continue; }
      text += JSON.parse(event.slice(6)).choices[0]?.delta?.content ?? "";
    }
  }
  return {status: response.status, type: response.headers.get("content-type"), text, reads, done};
}
main().catch(error => ({error: String(error)}))
  .then(result => fetch("/result", {method: "POST", body: JSON.stringify(result)}));
</script>"""


@pytest.fixture
def page(stack: Stack) -> Iterator[tuple[str, Queue[dict[str, Any]]]]:
    """A page of another origin, and what it reports."""
    results: Queue[dict[str, Any]] = Queue()
    document = PAGE.replace("GATEWAY", stack.url).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(document)))
            self.end_headers()
            self.wfile.write(document)

        def do_POST(self) -> None:
            results.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", results
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
def test_a_browser_streams_a_chat_from_another_origin(page: tuple[str, Queue[dict[str, Any]]], tmp_path: Path) -> None:
    url, results = page
    assert CHROMIUM is not None
    browser = subprocess.Popen(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path}", "--remote-debugging-port=0", url,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        result = results.get(timeout=90)
    finally:
        browser.terminate()
        browser.wait(20)
    assert result.get("error") is None, result
    assert result["status"] == 200
    assert result["type"].startswith("text/event-stream")
    assert result["done"]
    assert len(result["text"]) > 3
    assert result["reads"] > 2, "the answer came in one piece: it was not streamed"
