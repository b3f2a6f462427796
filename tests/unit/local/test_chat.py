"""`kvferry chat` against a real HTTP server that streams."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from kvferry_local.chat import STREAM_TIMEOUT, Conversation, pieces
from kvferry_local.cli import main
from kvferry_local.client import ClientSettings, RequestFailed, Target


class Server(ThreadingHTTPServer):
    """Answers each chat request with the lines that the test gives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.status = 200
        self.lines: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version: ClassVar[str] = "HTTP/1.0"

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["authorization"])
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._answer("".join(line + "\n" for line in self.server.lines))

    def _answer(self, body: str) -> None:
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def delta(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


def kvferry(*arguments: str, environ: dict[str, str] | None = None, typed: str = "") -> Result:
    return CliRunner(env=environ).invoke(main, arguments, input=typed)


def test_one_prompt_prints_one_answer(server: Server) -> None:
    server.lines = [": waiting", "", delta("Hel"), "", delta("lo ⚓"), "", "data: [DONE]", ""]
    result = kvferry("chat", "--url", server.url, "--max-tokens", "7", "hi", environ={"KVFERRY_API_KEY": "k"})
    assert (result.exit_code, result.stdout) == (0, "Hello ⚓\n")
    assert server.keys == ["Bearer k"]
    assert server.requests == [
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 7}
    ]


def test_a_conversation_keeps_its_turns(server: Server) -> None:
    server.lines = [delta("A"), "data: [DONE]"]
    result = kvferry("chat", "--url", server.url, typed="one\n\ntwo\n")
    assert result.exit_code == 0, result.output
    assert [message["content"] for message in server.requests[1]["messages"]] == ["one", "A", "two"]


def test_an_error_of_the_server_is_one_line(server: Server) -> None:
    server.status, server.lines = 404, [json.dumps({"error": {"message": "no such model"}})]
    settings = ClientSettings()
    with (
        Target(server.url, None, "m").open(settings, STREAM_TIMEOUT) as http,
        pytest.raises(RequestFailed, match="HTTP 404: no such model"),
    ):
        list(Conversation(http, "m").ask("hi"))


def test_an_error_in_the_stream_ends_the_answer_and_keeps_the_conversation(server: Server) -> None:
    server.lines = [delta("A"), 'data: {"error": {"message": "workers lost"}}', "data: [DONE]"]
    result = kvferry("chat", "--url", server.url, typed="one\ntwo\n")
    assert result.exit_code == 0
    assert result.output.count("kvferry: workers lost") == 2
    assert len(server.requests) == 2


def test_an_answer_that_is_abandoned_is_kept_as_far_as_it_came(server: Server) -> None:
    server.lines = [delta("A"), delta("B"), "data: [DONE]"]
    with Target(server.url, None, "m").open(ClientSettings(), STREAM_TIMEOUT) as http:
        conversation = Conversation(http, "m")
        answer = conversation.ask("hi")
        assert next(answer) == "A"
        answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "A"}


def test_a_gateway_that_is_not_there_is_one_line_that_names_the_setting() -> None:
    result = kvferry("chat", "--url", "http://127.0.0.1:9", "hi")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "--url" in result.output


def test_without_a_stack_the_run_file_is_named(tmp_path: object) -> None:
    result = kvferry("chat", "hi", environ={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "kvferry up" in result.output


def test_lines_after_done_and_comments_are_no_text() -> None:
    lines = [": hello", "event: x", delta("a"), "data: [DONE]", delta("b")]
    assert list(pieces(iter(lines))) == ["a"]
