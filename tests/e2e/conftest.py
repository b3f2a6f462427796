"""The stacks that end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stack import Stack

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
