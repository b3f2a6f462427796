"""The gateway's part of `scaling.yaml`: what its placement aims at."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from kvferry.errors import SettingError
from kvferry.scaling import GatewayScaling, scaling_path
from kvferry_gateway.targets import Targets


def read_targets(path: Path | None) -> Targets:
    """The targets in `path`, a file or a folder; else those that came with the gateway. Raises `SettingError`."""
    # `max_queue_s:` with nothing behind it is the target's default; JSON, and so a chart, knows no infinity.
    values = {name: value for name, value in GatewayScaling.read(path).targets.items() if value is not None}
    file = scaling_path("gateway", path)
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
