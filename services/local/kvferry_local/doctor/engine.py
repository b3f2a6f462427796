"""Processor, compiler, and whether the engine starts with each model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from kvferry_local.doctor.finding import Finding, failed, ok, warning
from kvferry_local.doctor.probe import ProbeFailed, probe
from kvferry_local.doctor.torch_build import INSTALL, torch_build
from kvferry_local.settings import DoctorSettings


async def engine(settings: DoctorSettings, models: Sequence[Path]) -> AsyncIterator[Finding]:
    """A worker's own start with each model, for each number of ranks that workers would have: choice, build, load,
    warm-up. Then the torch that is there."""
    asked = {field: getattr(settings, field) for field in ("engine", "dtype", "quantization", "device")}
    degrees = sorted({settings.ranks("prefill"), settings.ranks("decode")})
    needs_torch = settings.engine == "torch" or settings.device != "cpu"
    knows_processor = False
    for model, ranks in product(models, degrees):
        check = "engine" if ranks == 1 else f"engine on {ranks} ranks"
        worker = {"model": str(model), "tensor_parallel_size": ranks, **asked}
        try:
            answer = await probe("kvferry.worker.probe", json.dumps(worker))
        except ProbeFailed as error:
            yield failed(check, f"a worker does not start: {error}", f"{INSTALL}, or --engine torch")
            continue
        if not knows_processor:
            knows_processor = True
            yield _processor(answer["isas"])
        needs_torch |= settings.engine == "auto" and answer.get("engine") != "native"
        yield _started(check, answer, settings)
    yield await torch_build(settings, needed=needs_torch)


def _processor(isas: list[str]) -> Finding:
    if isas[0] == "portable":
        return warning(
            "processor", "has neither AVX-512 with BF16 and VNNI nor AVX2 for the native engine",
            "expect a fraction of the speed; --device cuda, or another machine",
        )  # fmt: skip
    return ok("processor", f"the native engine can use {', '.join(isas)}")


def _started(check: str, answer: dict[str, Any], settings: DoctorSettings) -> Finding:
    if "problem" in answer:
        return failed(check, answer["problem"], answer["setting"] or "see the log of the worker")
    detail = f"{answer['engine']} ({answer['why']}), loaded and warm in {answer['seconds']:.1f} s"
    if settings.engine == "auto" and settings.device == "cpu" and answer["engine"] == "torch":
        compiler = "" if answer["compilers"] else "install g++ or clang++, or name one in CXX"
        return warning(check, detail, compiler or "--engine native says what stands against it")
    return ok(check, detail)
