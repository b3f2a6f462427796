"""Processor, compiler, and whether the engine starts with this model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

from kvferry_local.doctor.finding import Finding, failed, ok, warning
from kvferry_local.doctor.probe import ProbeFailed, probe
from kvferry_local.settings import DoctorSettings


async def engine(settings: DoctorSettings, model_dir: Path) -> AsyncIterator[Finding]:
    """A worker's own start: choice, build, load, warm-up."""
    asked = {field: getattr(settings, field) for field in ("engine", "dtype", "quantization", "device")}
    try:
        answer = await probe("kvferry.worker.probe", json.dumps({"model": str(model_dir), **asked}))
    except ProbeFailed as error:
        yield failed("engine", f"a worker does not start: {error}", "pip install 'kvferry[worker]', or --engine torch")
        return
    isas = answer["isas"]
    if isas[0] == "portable":
        yield warning(
            "processor", "has neither AVX-512 with BF16 and VNNI nor AVX2 for the native engine",
            "expect a fraction of the speed; --device cuda, or another machine",
        )  # fmt: skip
    else:
        yield ok("processor", f"the native engine can use {', '.join(isas)}")
    if "problem" in answer:
        yield failed("engine", answer["problem"], answer["setting"] or "see the log of the worker")
        return
    detail = f"{answer['engine']} ({answer['why']}), loaded and warm in {answer['seconds']:.1f} s"
    if settings.engine == "auto" and settings.device == "cpu" and answer["engine"] == "torch":
        compiler = "" if answer["compilers"] else "install g++ or clang++, or name one in CXX"
        yield warning("engine", detail, compiler or "--engine native says what stands against it")
    else:
        yield ok("engine", detail)
