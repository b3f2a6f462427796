"""The stacks that end-to-end tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from bench.prompts import Prompts
from runners import Runner
from scene import MAX_MODEL_LEN, Scene, set_scene
from stack import Stack

from kvferry.engine.native.library import LibraryUnavailable, open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.reference import ReferencePass
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner

ORIGIN_FLAGS = ("--cors-origins", "*")  # a browser's page comes from another port


@pytest.fixture(scope="session")
def flags(model_dir: Path) -> tuple[str, ...]:
    return ("--model", str(model_dir), "--served-model-name", "smollm2", "--threads", "1", "--max-model-len", "2048")


@pytest.fixture(scope="session")
def stack(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One prefill and one decode worker, for the tests that leave it as it was."""
    stack = Stack(tmp_path_factory.mktemp("stack"), *flags, *ORIGIN_FLAGS)
    try:
        yield stack.start()
    finally:
        stack.close()


@pytest.fixture
def baseline(flags: tuple[str, ...], tmp_path: Path) -> Iterator[Stack]:
    """The single-worker stack, for the tests that end it."""
    stack = Stack(tmp_path, *flags, "--prefill", "0", "--decode", "1")
    try:
        yield stack.start()
    finally:
        stack.close()


@pytest.fixture(scope="module")
def judge(model_dir: Path) -> Iterator[ReferencePass]:
    """On the workers' engine: another one's rounding is within ε on processors with bf16, and not on all others."""
    settings = EngineSettings(
        model_dir, num_blocks=MAX_MODEL_LEN // 16, block_size=16, max_model_len=MAX_MODEL_LEN, threads=1
    )
    runner: Runner
    try:
        runner = NativeRunner(settings, library=open_library())
    except LibraryUnavailable:
        runner = TorchRunner(settings)
    yield ReferencePass(runner)
    runner.close()


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> Prompts:
    return Prompts(model_dir, seed=7)


@pytest.fixture
async def lone_pair(stack: Stack, model_dir: Path, prompts: Prompts, judge: ReferencePass) -> AsyncIterator[Scene]:
    async for scene in set_scene(stack, 2, model_dir, prompts, judge):
        yield scene
