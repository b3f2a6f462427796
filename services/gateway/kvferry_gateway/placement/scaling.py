"""The gateway's part of `scaling.yaml`: what its placement aims at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvferry.errors import SettingError
from kvferry.scaling import GatewayScaling, scaling_path
from kvferry_gateway.placement.targets import Targets


def read_targets(path: Path | None, models: Iterable[str]) -> dict[str, Targets]:
    """The targets of each model in `path`, a file or a folder; else those that came with the gateway.

    What a model has under `models` stands over `targets`. Raises `SettingError`.
    """
    scaling, file = GatewayScaling.read(path), scaling_path("gateway", path)
    found = {model: _targets({**scaling.targets, **scaling.models.get(model, {})}, file) for model in models}
    if unknown := [model for model in scaling.models if model not in found]:
        raise SettingError(f"models.{unknown[0]} in {file}", f"no such model; --model has {', '.join(found)}")
    return found


def _targets(given: Mapping[str, Any], file: Path) -> Targets:
    # `max_queue_s:` with nothing behind it is the target's default; JSON, and so a chart, knows no infinity.
    values = {name: value for name, value in given.items() if value is not None}
    kinds = {field.name: field.type for field in fields(Targets)}
    for name, value in values.items():
        if name not in kinds:
            raise SettingError(f"targets.{name} in {file}", f"unknown; known: {', '.join(kinds)}")
        wanted: tuple[type, ...] = (bool,) if kinds[name] == "bool" else (int, float)
        if isinstance(value, bool) != (wanted == (bool,)) or not isinstance(value, wanted):
            raise SettingError(f"targets.{name} in {file}", f"{value!r} is no {wanted[-1].__name__}")
    try:
        return Targets(**values)
    except ValueError as error:
        raise SettingError(f"targets in {file}", str(error)) from None
