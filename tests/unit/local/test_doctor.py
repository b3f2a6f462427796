"""`kvferry doctor`: each part is broken for real, found, and named with what mends it."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPES, build
from nats_server import running_nats

from kvferry.config.layers import load_settings
from kvferry_local.doctor.bus import bus
from kvferry_local.doctor.clock import MAX_SKEW_S, clock, peers_of
from kvferry_local.doctor.data_plane import data_plane
from kvferry_local.doctor.engine import engine
from kvferry_local.doctor.finding import Finding
from kvferry_local.doctor.machine import ports, shared_memory
from kvferry_local.doctor.model import find_model, memory
from kvferry_local.doctor.probe import ProbeFailed, probe
from kvferry_local.doctor.torch_build import torch_build
from kvferry_local.settings import DoctorSettings


def settings(**flags: object) -> DoctorSettings:
    return load_settings(DoctorSettings, config_file=None, environ={}, flags=flags)


async def all_of(findings: AsyncIterator[Finding]) -> dict[str, Finding]:
    return {finding.check: finding async for finding in findings}


def is_wrong(finding: Finding, status: str, detail: str, remedy: str) -> None:
    assert finding.status == status, finding
    assert detail in finding.detail
    assert remedy in finding.remedy


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model of a few kilobytes that an engine can load."""
    shape = next(shape for shape in SHAPES if shape.name == "llama-mqa-head80")
    directory = build(shape, tmp_path / "tiny", dtype=torch.bfloat16)
    (directory / "tokenizer.json").write_text("{}")
    return directory


# -- model and memory ------------------------------------------------------------------------------------------------


def test_a_whole_model_is_found(tiny: Path) -> None:
    directory, finding = find_model(str(tiny))
    assert directory == tiny
    assert finding.status == "ok"


def test_what_is_no_model_is_named(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: object) -> Finding:
        directory, finding = find_model(str(name))
        assert directory is None
        return finding

    is_wrong(wrong(tmp_path / "none"), "failed", "is no directory", "--model")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    is_wrong(wrong(tmp_path / "m.gguf"), "failed", "GGUF", "kvferry model import")
    (tmp_path / "empty").mkdir()
    is_wrong(wrong(tmp_path / "empty"), "failed", "config.json", "--model")
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "cache"))
    is_wrong(wrong("smollm2"), "failed", "not been fetched", "kvferry model fetch smollm2")
    for file in tiny.glob("*.safetensors"):
        file.unlink()
    is_wrong(wrong(tiny), "failed", "no *.safetensors", "--model")


def test_a_machine_with_too_little_memory_is_told_so(tiny: Path, tmp_path: Path) -> None:
    assert memory([tiny], [1]).status == "ok"
    is_wrong(memory([tiny, tiny], [1, 1 << 30]), "failed", "4 workers need", "KVFERRY_KV_MEMORY_MB")
    is_wrong(memory([tiny], [1], tmp_path / "meminfo"), "warning", "does not say", "free")


# -- engine ----------------------------------------------------------------------------------------------------------


async def test_an_engine_that_starts_is_told_with_what_it_runs_on(tiny: Path) -> None:
    found = await all_of(engine(settings(), [tiny]))
    assert found["processor"].status in ("ok", "warning")
    assert "loaded and warm" in found["engine"].detail
    assert found["torch"].status == "ok"
    assert found["torch"].detail.startswith(f"{torch.__version__}, built for ")


def without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """As far as other processes can see."""
    (folder / "torch.py").write_text(f"raise {error}\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")


NO_TORCH = "ModuleNotFoundError('No module named torch', name='torch')"


async def test_without_torch_the_native_engine_runs_and_what_needs_torch_is_told_how_to_get_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_torch(tmp_path, monkeypatch, NO_TORCH)
    found = await all_of(engine(settings(), [tiny]))
    if found["engine"].status == "ok":
        assert found["engine"].detail.startswith("native")
        assert (found["torch"].status, "not installed" in found["torch"].detail) == ("ok", True)
    else:
        pytest.skip("no native engine here")
    found = await all_of(engine(settings(engine="torch"), [tiny]))
    is_wrong(found["engine"], "failed", "pip install 'kvferry[worker]'", "--engine")
    is_wrong(found["torch"], "failed", "not installed", "pip install 'kvferry[worker]'")


async def test_without_torch_and_without_a_compiler_torch_is_asked_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_torch(tmp_path, monkeypatch, NO_TORCH)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "cache"))
    found = await all_of(engine(settings(), [tiny]))
    is_wrong(found["engine"], "failed", "native library is not available", "--engine")
    is_wrong(found["torch"], "failed", "not installed", "pip install 'kvferry[worker]'")


async def test_a_torch_that_is_broken_or_built_for_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.version.cuda is None:
        found = await torch_build(settings(device="cuda"), needed=True)
        is_wrong(found, "failed", "built for CPUs, and --device is cuda", "--index-url")
    without_torch(tmp_path, monkeypatch, "OSError('libcudart.so.12: cannot open shared object file')")
    is_wrong(await torch_build(settings(), needed=False), "failed", "libcudart.so.12", "pip install")


async def test_an_engine_that_cannot_be_had_is_named_by_its_setting(tiny: Path) -> None:
    found = await all_of(engine(settings(engine="native", dtype="float32"), [tiny]))
    is_wrong(found["engine"], "failed", "float32", "--engine")
    found = await all_of(engine(settings(device="nowhere"), [tiny]))
    assert found["engine"].status == "failed"


async def test_each_degree_that_workers_would_have_is_tried(tiny: Path) -> None:
    found = await all_of(engine(settings(tensor_parallel_size=2, decode_tensor_parallel_size=64), [tiny]))
    assert "loaded and warm" in found["engine on 2 ranks"].detail
    is_wrong(found["engine on 64 ranks"], "failed", "can be split over 1 to", "--tensor-parallel-size")


async def test_weights_that_are_cut_short_are_named(tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = await all_of(engine(settings(), [tiny]))
    is_wrong(found["engine"], "failed", weights.name, "--model")


async def test_without_a_compiler_torch_runs_and_the_compiler_is_asked_for(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "cache"))
    found = await all_of(engine(settings(), [tiny]))
    is_wrong(found["engine"], "warning", "torch", "g++")


async def test_a_probe_that_says_nothing_or_crashes_is_a_finding() -> None:
    with pytest.raises(ProbeFailed, match=r"ended with 1: .*kvferry_no_such"):
        await probe("kvferry_no_such")
    with pytest.raises(ProbeFailed, match="ended with 0"):
        await probe("this")
    with pytest.raises(ProbeFailed, match="SIGSEGV"):
        await probe("timeit", "-n1", "-r1", "-s", "import ctypes", "ctypes.string_at(0)")


# -- data plane ------------------------------------------------------------------------------------------------------


async def test_both_backends_move_bytes_and_ucx_says_what_it_has() -> None:
    found = await all_of(data_plane(settings()))
    assert {name: finding.status for name, finding in found.items() if finding.status == "failed"} == {}
    assert "tcp/lo" in found["ucx"].detail
    assert "without RDMA" in found["ucx"].detail
    for check in ("ucx transfer", "tcp transfer"):
        assert "GB/s" in found[check].detail


async def test_a_device_that_does_not_exist_is_named() -> None:
    found = await all_of(data_plane(settings(transport="ucx", ucx_net_devices="no_such_device")))
    is_wrong(found["ucx transfer"], "failed", "device", "--ucx-net-devices")


async def test_a_machine_without_ucx_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libucx.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = await all_of(data_plane(settings(transport="ucx")))
    is_wrong(found["ucx"], "failed", "no UCX library", "kvferry[ucx]")
    found = await all_of(data_plane(settings(transport="auto")))
    is_wrong(found["ucx"], "warning", "no UCX library", "--transport tcp")
    assert found["tcp transfer"].status in ("ok", "warning")


# -- bus -------------------------------------------------------------------------------------------------------------


async def test_nats_answers_whether_it_is_embedded_or_named() -> None:
    assert [finding.status for finding in await bus(settings(), 8192)] == ["ok", "ok"]
    async with running_nats() as server:
        named = settings(nats_url=server.embedded.url, nats_user=server.user, nats_password=server.password)
        assert [finding.status for finding in await bus(named, 8192)] == ["ok", "ok"]


async def test_nats_that_refuses_or_is_not_there_or_takes_too_little_is_named() -> None:
    async with running_nats(max_payload=1 << 16) as server:
        right = {
            "nats_url": server.embedded.url, "nats_user": server.user,
            "nats_password": server.password,
        }  # fmt: skip
        (finding,) = await bus(settings(**right | {"nats_password": "guess"}), 8192)
        is_wrong(finding, "failed", "uthorization", "KVFERRY_NATS_PASSWORD")
        assert "guess" not in finding.detail
        nats, payload = await bus(settings(**right), 1 << 20)
        assert nats.status == "ok"
        is_wrong(payload, "failed", "65,536", "max_payload")
    (finding,) = await bus(settings(nats_url="nats://127.0.0.1:1"), 8192)
    is_wrong(finding, "failed", "no NATS server", "KVFERRY_NATS_URL")
    (finding,) = await bus(settings(**right | {"nats_tls_ca": "/no/such/file"}), 8192)
    is_wrong(finding, "failed", "/no/such/file", "KVFERRY_NATS_TLS_CA")


# -- machine and clock -----------------------------------------------------------------------------------------------


def test_a_taken_port_and_a_strange_host_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        is_wrong(ports("127.0.0.1", port, ()), "failed", f"{port} is taken", "--port")
        assert ports("127.0.0.1", port, (f"http://127.0.0.1:{port}",)).status == "ok"
    assert ports("127.0.0.1", port, ()).status == "ok"
    is_wrong(ports("192.0.2.1", 0, ()), "failed", "192.0.2.1", "--host")


def test_shared_memory_that_is_missing_or_small_is_named(tmp_path: Path) -> None:
    assert shared_memory(Path("/")).status == "ok"
    is_wrong(shared_memory(tmp_path / "none"), "warning", "No such file", "--shm-size")
    if shutil.which("unshare") is None:
        pytest.skip("no unshare: a small file system cannot be mounted")
    look = "from kvferry_local.doctor.machine import shared_memory; f = shared_memory(); print(f.status, f.detail)"
    script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} -c "{look}"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.stdout.startswith("warning 1 MB free in /dev/shm"), done


@contextmanager
def peer(skew_s: float) -> Iterator[str]:
    """A real HTTP server whose clock is off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + skew_s, usegmt=True)

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_clock_that_is_off_is_found_among_those_that_are_not() -> None:
    with peer(0) as right, peer(3600) as ahead, peer(-90) as behind:
        assert clock({"right": right}).status == "ok"
        assert "1 peers within" in clock({"right": right, "gone": "http://127.0.0.1:1"}).detail
        is_wrong(clock({"right": right, "late": ahead}), "warning", "late's clock is 3,", "NTP")
        found = clock({"right": right, "early": behind})
        is_wrong(found, "warning", "behind this machine's", "timedatectl")
    with peer(MAX_SKEW_S / 2) as close:
        assert clock({"close": close}).status == "ok"
    assert clock({}).status == "ok"


def test_a_workers_debug_port_is_on_the_host_of_its_data_plane() -> None:
    rows = [
        {"name": "a", "address": ["ucx://10.0.0.1:5000"], "debug_port": 8001},
        {"name": "b", "address": ["tcp://[fd00::1]:5000"], "debug_port": 8001},
        {"name": "c", "address": [], "debug_port": 8001},
        {"name": "d", "address": ["ucx://10.0.0.1:5000"], "debug_port": 0},
    ]
    assert peers_of(rows) == {"a": "http://10.0.0.1:8001", "b": "http://[fd00::1]:8001"}


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_ends_with_1_and_says_so_as_json_when_something_failed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from kvferry_local.cli import main; main()", "doctor", "--json", "--port", "0"]
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "KVFERRY_TRANSPORT": "tcp"}
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "none")], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["healthy"] is False
    assert [finding["check"] for finding in document["findings"] if finding["status"] == "failed"] == ["model"]
    assert all(finding["remedy"] for finding in document["findings"] if finding["status"] != "ok")
