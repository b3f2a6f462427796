"""Bad input from every side of a real stack: each gets a clear error or is dropped and counted, and costs nothing.

After every test the same stack still answers a chat, no worker holds anything, and no process has opened a
descriptor that it kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from bench.tap import bus_of
from books import HOST, Row, cluster, port_of, seconds_until_clean, whole
from nats_server import running_nats
from prometheus_client.parser import text_string_to_metric_families
from stack import KVFERRY, Stack

from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import BusRole
from kvferry.runtime import blocking_clock
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Ping
from kvferry.wire.subjects import beat_subject, mail_subject, process_subject
from kvferry_local.bench.endpoint import Endpoint

SETTLE_S = 15.0  # at most, until connections that a test made are closed on the other side, too
MAX_BODY_BYTES = 4 << 20
GARBAGE = bytes(range(256)) * 64
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "messages": HELLO, "max_tokens": 2, **fields}


def num_descriptors(stack: Stack) -> dict[int, int]:
    """Of every process of the stack."""
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in stack.processes()}


async def sample(port: int, name: str, **labels: str) -> float:
    """The sum of a /metrics' samples with these labels; 0 if there are none yet."""
    text = (await Endpoint(HOST, port).get("/metrics")).decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum((s.value for s in samples if s.name == name and labels.items() <= s.labels.items()), 0.0)


@pytest.fixture
async def rows(stack: Stack) -> AsyncIterator[list[Row]]:
    """The workers of the stack; afterwards they are as they were, and serve."""
    rows = await whole(stack, 2)
    incarnations = {row["incarnation"] for row in rows}
    await answers_a_chat(stack)  # so that every connection that lasts is there
    yield rows
    await answers_a_chat(stack)
    await seconds_until_clean(rows, blocking_clock(), lambda: SETTLE_S)
    assert {row["incarnation"] for row in await cluster(stack)} == incarnations  # nobody died of it


@pytest.fixture
async def no_descriptor_kept(stack: Stack, rows: list[Row]) -> AsyncIterator[None]:
    before = await settled_descriptors(stack)
    yield
    await few_more_descriptors(stack, before, 0)


async def settled_descriptors(stack: Stack) -> dict[int, int]:
    """Once connections that have just been closed are gone on the other side, too."""
    counts = [num_descriptors(stack)]
    while len(counts) < 4 or counts[-1] != counts[-4]:
        await asyncio.sleep(0.05)
        counts.append(num_descriptors(stack))
    return counts[-1]


async def few_more_descriptors(stack: Stack, before: dict[int, int], most: int) -> None:
    """Every process has, within `SETTLE_S`, at most so many more than before."""
    deadline = blocking_clock() + SETTLE_S
    while True:
        now = num_descriptors(stack)
        if all(count <= before[pid] + most for pid, count in now.items()):
            return
        assert blocking_clock() < deadline, f"descriptors: {before} before, {now} now"
        await asyncio.sleep(0.05)


async def answers_a_chat(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=90, trust_env=False) as http:
        answer = await http.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1


# -- HTTP ------------------------------------------------------------------------------------------------------

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REFUSED: dict[str, tuple[str, Any, int, str | None]] = {
    # name: path, body (bytes as they are, else JSON), status, param of the error
    "malformed JSON": (CHAT, b'{"model": "smollm2", "messages": [', 400, None),
    "no body": (CHAT, b"", 400, None),
    "a body that is a list": (CHAT, [chat()], 400, None),
    "nested a hundred thousand deep": (CHAT, b"[" * 100_000, 400, None),
    "invalid UTF-8": (CHAT, json.dumps(chat()).encode().replace(b"Hello", b"Hel\xff\xfe"), 400, None),
    "half a surrogate pair": (CHAT, json.dumps(chat()).encode().replace(b"Hello", rb"\ud800"), 400, None),
    "messages of a wrong type": (CHAT, chat(messages="Hello"), 400, "messages"),
    "content of a wrong type": (CHAT, chat(messages=[{"role": "user", "content": 7}]), 400, "messages[0].content"),
    "max_tokens of a wrong type": (CHAT, chat(max_tokens="two"), 400, "max_tokens"),
    "stream of a wrong type": (CHAT, chat(stream="yes"), 400, "stream"),
    "temperature of a wrong type": (CHAT, chat(temperature=[1]), 400, "temperature"),
    "a temperature that is no number": (CHAT, b'{"model":"smollm2","messages":[],"temperature":NaN}', 400, None),
    "empty messages": (CHAT, chat(messages=[]), 400, "messages"),
    "no messages": (CHAT, {"model": "smollm2"}, 400, "messages"),
    "an unknown role": (CHAT, chat(messages=[{"role": "wizard", "content": "Hello"}]), 400, "messages[0].role"),
    "max_tokens 0": (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    "max_tokens below 0": (CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    "a prompt over the context": (CHAT, chat(messages=[{"role": "user", "content": "word " * 3000}]), 400, "messages"),
    "token ids over the context": (TEXT, {"model": "smollm2", "prompt": [5] * 2048, "max_tokens": 1}, 400, "prompt"),
    "prompt and output over the context": (CHAT, chat(max_tokens=100_000), 400, "max_tokens"),
    "a token id over the vocabulary": (TEXT, {"model": "smollm2", "prompt": [1 << 20], "max_tokens": 1}, 400, "prompt"),
    "an empty prompt of token ids": (TEXT, {"model": "smollm2", "prompt": [], "max_tokens": 1}, 400, "prompt"),
    "10,000 stop strings": (CHAT, chat(stop=[f"s{i}" for i in range(10_000)]), 400, "stop"),
    "a stop string of a megabyte": (CHAT, chat(stop="x" * (1 << 20)), 400, "stop"),
    "an empty stop string": (CHAT, chat(stop=[""]), 400, "stop[0]"),
    "an unknown field": (CHAT, chat(temprature=1), 400, "temprature"),
    "a field that is not built": (CHAT, chat(functions=[{"name": "f"}]), 400, "functions"),
    "an unknown model": (CHAT, chat(model="gpt-17"), 404, "model"),
    "an unknown path": ("/v1/chat/completion", chat(), 404, None),
    "a body over the limit": (CHAT, b" " * (MAX_BODY_BYTES + 1), 413, None),
}  # fmt: skip


@pytest.mark.usefixtures("no_descriptor_kept")
async def test_a_bad_request_is_refused_by_name_and_reaches_no_worker(stack: Stack, rows: list[Row]) -> None:
    """All in one test: what follows each is the same, and the fixture's checks cost more than the requests."""
    placed = await sample(port_of(stack), "kvferry_prompt_token_total")
    assert placed > 0, "the fixture's own chat"
    async with httpx.AsyncClient(base_url=stack.url, timeout=90, trust_env=False) as http:
        for name, (path, body, status, param) in REFUSED.items():
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await http.post(path, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == status, (name, answer.text[:300])
            error = answer.json()["error"]
            assert error["message"], name
            assert set(error) == {"message", "type", "param", "code"}, name
            assert error["param"] == param, (name, error)
            assert len(answer.content) < 2000, name  # nothing of what was sent comes back at length
            assert (await http.get("/health")).status_code == 200, name
    assert await sample(port_of(stack), "kvferry_prompt_token_total") == placed


@pytest.mark.usefixtures("no_descriptor_kept")
async def test_a_body_without_a_length_is_cut_off_at_the_limit(stack: Stack, rows: list[Row]) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b" " * (1 << 16)

    async with httpx.AsyncClient(base_url=stack.url, timeout=90, trust_env=False) as http:
        try:
            answer = await http.post(CHAT, content=endless())
        except httpx.TransportError:
            pass  # the gateway had answered, and hung up on what came after
        else:
            assert answer.status_code == 413
    assert sent < 16 * MAX_BODY_BYTES


@pytest.mark.usefixtures("no_descriptor_kept")
def test_what_is_no_http_is_refused_at_the_gateway(stack: Stack, rows: list[Row]) -> None:
    for garbage in (
        GARBAGE,
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + GARBAGE,
        b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000,
    ):
        assert read_to_the_end(port_of(stack), garbage)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")


# -- plain TCP -------------------------------------------------------------------------------------------------


def read_to_the_end(port: int, *pieces: bytes) -> bytes:
    """Send, and read until the other side closes."""
    with socket.create_connection((HOST, port), timeout=60) as client:
        received = b""
        try:
            for piece in pieces:
                client.sendall(piece)
            while piece := client.recv(1 << 16):
                received += piece
        except (ConnectionResetError, BrokenPipeError):
            pass  # it closed on us: as good
        return received


def write_garbage(port: int) -> int:
    """In every manner that costs the other side something different. Returns the number of connections."""
    silent = socket.create_connection((HOST, port))
    with socket.create_connection((HOST, port)) as leaves_at_once:
        leaves_at_once.sendall(b"\xff")
    kinds = (GARBAGE, bytes(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    for garbage in kinds:
        with socket.create_connection((HOST, port), timeout=60) as client:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
    silent.close()
    return 2 + len(kinds)


@pytest.mark.usefixtures("no_descriptor_kept")
def test_a_plain_tcp_client_that_writes_garbage_to_a_debug_port_disturbs_nothing(rows: list[Row]) -> None:
    for row in rows:
        write_garbage(row["debug_port"])


async def test_a_plain_tcp_client_that_writes_garbage_to_a_data_port_disturbs_nothing(
    stack: Stack, rows: list[Row]
) -> None:
    before = await settled_descriptors(stack)
    for row in rows:
        num_connections = write_garbage(int(row["address"][0].rsplit(":", 1)[1]))
    # UCX's own connection manager forgets to close what began with garbage (docs/architecture.md).
    uses_ucx = any(row["transport"] == "ucx" for row in rows)
    await few_more_descriptors(stack, before, num_connections if uses_ucx else 0)


# -- the bus ---------------------------------------------------------------------------------------------------

BAD_MESSAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "of 0 bytes": (lambda: b"", "malformed"),
    "of garbage": (lambda: b"\x01" + GARBAGE, "malformed"),
    "of a wrong version": (lambda: b"\x63" + Codecs().to_worker.encode(Ping(1))[1:], "unknown_version"),
    "of a megabyte of nothing": (lambda: b"\x01" + bytes(1 << 20), "malformed"),
    "cut short": (lambda: Codecs().to_worker.encode(Ping(1))[:-1], "malformed"),
    "of an unknown kind": (lambda: b"\x01\x92\xa7unknown\x01", "malformed"),
    "nested too deep": (lambda: b"\x01" + b"\x91" * 100_000, "malformed"),
}


@pytest.mark.usefixtures("no_descriptor_kept")
async def test_a_bad_message_on_the_bus_is_dropped_and_counted(stack: Stack, rows: list[Row]) -> None:
    async with httpx.AsyncClient(base_url=stack.url, trust_env=False) as http:
        gateway = (await http.get("/v1/cluster")).json()["gateway"]
    cluster_name = stack.facts.cluster
    targets = [(row["debug_port"], row["role"], row["name"], row["incarnation"]) for row in rows]
    targets.append((port_of(stack), "gateway", gateway["name"], gateway["incarnation"]))
    for port, role, name, incarnation in targets:
        sender: BusRole = "decode" if role == "gateway" else "gateway"
        own = mail_subject(process_subject(cluster_name, role, name, int(incarnation, 16)), sender)
        # What this role listens to besides: a stranger's heartbeats.
        beats = beat_subject(cluster_name, sender, "stranger", 1)
        async with bus_of(stack.facts, sender) as bus:
            for subject in (own, beats):
                await counts_each_bad_message(bus, subject, port)


async def counts_each_bad_message(bus: NatsBus, subject: str, port: int) -> None:
    for what, (payload, kind) in BAD_MESSAGES.items():
        counter = ("kvferry_wire_error_total", {"plane": "bus", "kind": kind})
        before = await sample(port, counter[0], **counter[1])
        await bus.publish(subject, payload())
        async with asyncio.timeout(60):
            while await sample(port, counter[0], **counter[1]) <= before:
                await asyncio.sleep(0.01)
        assert await sample(port, counter[0], **counter[1]) == before + 1, (subject, what)


# -- `kvferry up` over what cannot work ------------------------------------------------------------------------


async def up_fails(tmp_path: Path, *flags: str, **environ: str) -> tuple[int, str]:
    """Exit code and the one line that it says on stderr besides its log, which is kept in `tmp_path`/up.log."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVFERRY_")}
    process = await asyncio.create_subprocess_exec(
        KVFERRY, "up", "--port", "0", "--run-file", str(tmp_path / "run.json"), "--log-format", "json",
        "--threads", "1", *flags,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**clean, "OMP_NUM_THREADS": "1", **environ}, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(150):
            out, err = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    (tmp_path / "up.log").write_bytes(err)
    assert b"Traceback" not in err, err.decode()
    assert b"ready on" not in out
    said = [line for line in err.decode().splitlines() if line.startswith("kvferry: ")]
    assert len(said) == 1, err.decode()
    assert process.returncode is not None
    assert not (tmp_path / "run.json").exists()
    return process.returncode, said[0]


async def test_a_server_whose_max_payload_is_too_small_is_named(model_dir: Path, tmp_path: Path) -> None:
    async with running_nats(max_payload=4096) as server:
        code, line = await up_fails(
            tmp_path, "--model", str(model_dir),
            KVFERRY_NATS_URL=server.embedded.url, KVFERRY_NATS_USER=server.user,
            KVFERRY_NATS_PASSWORD=server.password,
        )  # fmt: skip
    assert code == 2, line
    assert "max_payload" in line
    assert "4096" in line
    # Told at once: no child had begun to load a model.
    assert not any(child in (tmp_path / "up.log").read_text() for child in ("gateway-0", "prefill-0", "decode-0"))


async def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, line = await up_fails(tmp_path, "--model", str(tmp_path / "nowhere"))
    assert code == 2, line
    assert "--model" in line


def cut_short(weights: Path, original: bytes) -> str:
    weights.write_bytes(original[: len(original) // 2])
    return weights.name


def not_safetensors(weights: Path, original: bytes) -> str:
    weights.write_bytes(b"PK\x03\x04" + GARBAGE)  # as an archive of pickles would begin
    return weights.name


def without_a_tensor(weights: Path, original: bytes) -> str:
    def change(header: dict[str, Any]) -> str:
        header["model.layers.0.x"] = header.pop("model.norm.weight")  # its bytes stay, under another name
        return "model.norm.weight"

    return with_header(weights, original, change)


def of_a_wrong_shape(weights: Path, original: bytes) -> str:
    def change(header: dict[str, Any]) -> str:
        header["model.norm.weight"]["shape"] = [24, 24]  # as many elements, another form
        return "model.norm.weight"

    return with_header(weights, original, change)


def with_header(weights: Path, original: bytes, change: Callable[[dict[str, Any]], str]) -> str:
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    named = change(header)
    changed = json.dumps(header).encode().ljust(length)
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + original[8 + length :])
    return named


def copy_broken(model_dir: Path, broken: Path, damage: Callable[[Path, bytes], str]) -> str:
    """All files but the weights as they are. Returns what an error must name."""
    broken.mkdir()
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).symlink_to(file)
    return damage(broken / "model.safetensors", (model_dir / "model.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [cut_short, not_safetensors, without_a_tensor, of_a_wrong_shape])
async def test_a_broken_checkpoint_is_named_in_one_line(
    model_dir: Path, tmp_path: Path, damage: Callable[[Path, bytes], str]
) -> None:
    broken = tmp_path / "broken"
    named = copy_broken(model_dir, broken, damage)
    code, line = await up_fails(tmp_path, "--model", str(broken), "--prefill", "0")
    assert code in (1, 2), line
    assert named in line


async def test_a_ucx_whose_library_does_not_load_is_named(model_dir: Path, tmp_path: Path) -> None:
    """The wheel's loader is asked first; one that fails stands before it on the path."""
    (tmp_path / "libucx").mkdir()
    (tmp_path / "libucx" / "__init__.py").write_text(
        "def load_library():\n    raise OSError('libucs.so.0: cannot open shared object file')\n"
    )
    code, line = await up_fails(
        tmp_path, "--model", str(model_dir), "--prefill", "0", "--transport", "ucx", PYTHONPATH=str(tmp_path)
    )
    assert code in (1, 2), line
    assert "tcp" in line
    assert "transport" in line
