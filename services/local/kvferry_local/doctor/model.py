"""The model's directory, and whether weights and KV fit into memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvferry.errors import CheckpointError
from kvferry.text.fetch import KNOWN_MODELS, cached_model
from kvferry.text.model_dir import ModelDir
from kvferry_local.doctor.finding import Finding, failed, ok, warning

MEMINFO: Final = Path("/proc/meminfo")
WEIGHTS: Final = "*.safetensors"


def find_model(name: str) -> tuple[Path | None, Finding]:
    """Its directory; None where there is none to look at."""
    check = "model"
    if name in KNOWN_MODELS:
        directory = cached_model(name)
        if directory is None:
            return None, failed(check, f"{name} has not been fetched", f"kvferry model fetch {name}")
    else:
        directory = Path(name).expanduser()
        if directory.suffix == ".gguf" and directory.is_file():
            return None, failed(check, f"{name} is a GGUF file", f"kvferry model import {name} DIRECTORY")
        if not directory.is_dir():
            known = ", ".join(KNOWN_MODELS)
            return None, failed(check, f"{name} is no directory", f"--model DIRECTORY, or a known name: {known}")
    try:
        model = ModelDir(directory)
    except CheckpointError as error:
        return None, failed(check, str(error), "--model: a whole directory in Hugging Face form")
    num_files, size = _weights(directory)
    if num_files == 0:
        return None, failed(check, f"{directory} holds no {WEIGHTS}", "--model: a whole directory in Hugging Face form")
    return directory, ok(check, f"{model.name}: {size / 1e9:.2f} GB of weights, context {model.max_context:,}")


def memory(directories: Sequence[Path], kv_pools: Sequence[int], meminfo: Path = MEMINFO) -> Finding:
    """Weights and KV pools (MiB of each worker of one model) of all workers, against the memory that is free now."""
    check = "memory"
    num_workers = len(kv_pools) * len(directories)
    needed = sum(_weights(directory)[1] + (pool << 20) for directory in directories for pool in kv_pools)
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        return warning(check, f"{meminfo} does not say how much is free", f"have {needed / 1e9:.1f} GB free")
    free = int(found[1]) << 10
    detail = f"{num_workers} workers need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if needed > free:
        return failed(check, detail, "KVFERRY_KV_MEMORY_MB, --quantization int8, fewer workers, or a smaller --model")
    return ok(check, detail)


def _weights(directory: Path) -> tuple[int, int]:
    """(files, bytes)."""
    sizes = [file.stat().st_size for file in directory.glob(WEIGHTS)]
    return len(sizes), sum(sizes)
