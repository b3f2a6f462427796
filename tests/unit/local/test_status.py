"""`kvferry status` shows whole names where a program reads it."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from kvferry.config.layers import load_settings
from kvferry_local.client import Target
from kvferry_local.cluster import show_status
from kvferry_local.settings import ClientSettings

NAME = "prefill-" + "x" * 60
LOAD = {"num_waiting": 1, "num_running": 2, "free_blocks": 3}
ROW = {
    "name": NAME, "role": "prefill", "state": "draining", "pid": 4194304, "model": "m" * 60, "transport": "ucx",
    "load": LOAD, "engine": "native", "ranks": 2, "engine_reason": "asked for", "unserved": "another vocabulary",
    "refuses": {"prefill-1": "KV in float32 instead of bfloat16"},
}  # fmt: skip


class Gateway(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"workers": [ROW]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_no_name_is_cut_off_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            target = Target(f"http://127.0.0.1:{server.server_address[1]}", None, "")
            show_status(target, load_settings(ClientSettings, config_file=None, environ={}, flags={}))
        finally:
            server.shutdown()
            thread.join()
    heading, row, *remarks = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "NAME"
    assert row.split() == [NAME, "prefill", "draining", "4194304", "m" * 60, "ucx", "1", "2", "3"]
    assert remarks == [
        f"{NAME}: engine native on 2 ranks, asked for",
        f"{NAME}: gets no request: another vocabulary",
        f"{NAME}: takes no KV from prefill-1: KV in float32 instead of bfloat16",
    ]
