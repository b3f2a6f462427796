"""The leak check itself: planted leaks must be found."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from leaks import SHARED_MEMORY, Holdings, leaks_since

Undo = Callable[[], object]


async def plant_task() -> Undo:
    return asyncio.create_task(asyncio.Event().wait(), name="planted").cancel


async def plant_thread() -> Undo:
    done = threading.Event()
    threading.Thread(target=done.wait, name="planted").start()
    return done.set


async def plant_socket() -> Undo:
    return socket.socket().close


async def plant_file() -> Undo:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    return lambda: os.close(descriptor)


async def plant_segment() -> Undo:
    segment = SHARED_MEMORY / f"planted-{os.getpid()}"
    segment.touch()
    return segment.unlink


async def plant_process() -> Undo:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import signal; signal.pause()")
    return process.kill


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (plant_task, "task planted"),
        (plant_thread, "thread planted"),
        (plant_socket, "descriptor of socket"),
        (plant_file, "descriptor of /dev/null"),
        (plant_segment, "shared memory"),
        (plant_process, "child process"),
    ],
)
async def test_a_planted_leak_is_found(
    plant: Callable[[], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leaks.SETTLE_S", 0.05)
    before = Holdings.now()
    undo = await plant()  # type: ignore[misc]
    try:
        found = await leaks_since(before)
        assert any(words in leak for leak in found), found
    finally:
        undo()
    monkeypatch.setattr("leaks.SETTLE_S", 5.0)
    assert not [leak for leak in await leaks_since(before) if words in leak]


@pytest.mark.usefixtures("no_leaks")
async def test_a_clean_test_passes_the_check() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()


@pytest.mark.parametrize(("allowed", "code"), [("", 1), ("test_skipping.py::* needs a reason", 0)])
def test_a_skip_that_the_list_does_not_allow_fails_the_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, allowed: str, code: int
) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile(test_skipping="import pytest\ndef test_it():\n    pytest.skip('no')\n")
    monkeypatch.setenv("KVFERRY_ALLOWED_SKIPS", str(pytester.makefile(".txt", allowed=allowed)))
    assert pytester.runpytest_subprocess("-p", "no:cacheprovider").ret == code
