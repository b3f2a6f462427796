"""Which engine runs a model, and why. Pure but for the question whether there is a native library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from kvferry.engine.config import ModelConfig
from kvferry.engine.settings import QUANTIZATIONS, EngineSettings, resolved_dtype
from kvferry.errors import SettingError

EngineName = Literal["native", "torch"]
NATIVE_DTYPE: Final = "bfloat16"
PAGE_TOKENS: Final = 16  # of the native KV cache: a block is whole pages


@dataclass(frozen=True, slots=True)
class Choice:
    engine: EngineName
    why: str  # one line, for the log and `kvferry status`


def obstacle(settings: EngineSettings, config: ModelConfig) -> tuple[str, str] | None:
    """What keeps the native engine from running this: (setting, problem); None: nothing does."""
    if settings.device != "cpu":
        return "device", f"{settings.device!r}, the native engine runs on cpu"
    if settings.remote_ranks:
        return "remote_ranks", f"{settings.remote_ranks}, the ranks of the native engine share memory"
    dtype = resolved_dtype(settings, config)
    if dtype != NATIVE_DTYPE:
        named = dtype if settings.dtype == dtype else f"{settings.dtype} ({dtype} in the checkpoint)"
        return "dtype", f"{named}, the native engine computes in {NATIVE_DTYPE}"
    if settings.block_size % PAGE_TOKENS:
        return "block_size", f"{settings.block_size}, the native engine needs a multiple of {PAGE_TOKENS}"
    if settings.quantization not in QUANTIZATIONS:
        return "quantization", f"{settings.quantization!r}, there are: {', '.join(QUANTIZATIONS)}"
    return None


def choose(
    wanted: Literal["auto", "native", "torch"],
    settings: EngineSettings,
    config: ModelConfig,
    library_problem: Callable[[], str | None],
) -> Choice:
    """`library_problem` says why there is no native library, None if there is one; it is asked only if it matters.

    Raises `SettingError` where what was asked for cannot be had: it names the setting that stands against it.
    """
    if wanted == "torch":
        if settings.quantization != "none":
            raise SettingError("quantization", f"{settings.quantization!r} needs the native engine")
        return Choice("torch", "asked for")
    found = obstacle(settings, config)
    if found is None and (problem := library_problem()) is not None:
        found = ("engine", f"the native library is not available: {problem}")
    if found is None:
        return Choice("native", "asked for" if wanted == "native" else "it serves this model on this processor")
    setting, problem = found
    why = problem if setting == "engine" else f"{setting} is {problem}"
    if wanted == "native":
        raise SettingError("engine", f"native cannot be had: {why}")
    if settings.quantization != "none":
        raise SettingError("quantization", f"{settings.quantization!r} needs the native engine: {why}")
    return Choice("torch", why)
