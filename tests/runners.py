"""The runners that a test goes over: torch, and native on every instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import pytest

from kvferry.engine.native.cpu import cpu_flags, usable_isas
from kvferry.engine.native.library import Library, LibraryUnavailable, open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner

ISAS = usable_isas(cpu_flags())
NATIVE = tuple(f"native-{isa}" for isa in ISAS)
Runner: TypeAlias = TorchRunner | NativeRunner


def native_library(isa: str = "auto") -> Library:
    """Built on first use. Skips the test on a machine without a compiler."""
    try:
        return open_library(isa)
    except LibraryUnavailable as error:
        pytest.skip(f"no native library: {error}")


def runner_of(name: str, settings: EngineSettings) -> Runner:
    """`name` is "torch", "native" (the best instruction set) or "native-" and an instruction set."""
    if name == "torch":
        return TorchRunner(settings)
    isa = name.removeprefix("native").removeprefix("-") or "auto"
    return NativeRunner(replace(settings, isa=isa), library=native_library(isa))
