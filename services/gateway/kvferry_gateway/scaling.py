"""`scaling.yaml`: how the gateway is scaled, and what its placement aims at."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Final

import yaml

from kvferry.errors import SettingError
from kvferry_gateway.targets import Targets

BESIDE: Final = Path(__file__).parents[1] / "scaling.yaml"  # in a checkout; a wheel has none
MAX_SCALING_BYTES: Final = 1 << 16
SECTIONS: Final = ("targets",)


def read_targets(path: Path | None) -> Targets:
    """The targets in `path`, else in the checkout's own file, else the defaults. Raises `SettingError`."""
    if path is None:
        return read_targets(BESIDE) if BESIDE.exists() else Targets()
    document = _read(path)
    for section in document:
        if section not in SECTIONS:
            raise SettingError(f"{section} in {path}", f"unknown section; known: {', '.join(SECTIONS)}")
    values = document.get("targets") or {}
    if not isinstance(values, dict):
        raise SettingError(f"targets in {path}", "must be a mapping")
    for name, value in values.items():
        kinds = {field.name: field.type for field in fields(Targets)}
        if name not in kinds:
            raise SettingError(f"targets.{name} in {path}", f"unknown; known: {', '.join(kinds)}")
        wanted: tuple[type, ...] = (bool,) if kinds[name] == "bool" else (int, float)
        if isinstance(value, bool) != (wanted == (bool,)) or not isinstance(value, wanted):
            raise SettingError(f"targets.{name} in {path}", f"{value!r} is no {wanted[-1].__name__}")
    try:
        return Targets(**values)
    except ValueError as error:
        raise SettingError(f"targets in {path}", str(error)) from None


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SCALING_BYTES + 1)
    except OSError as error:
        raise SettingError("--scaling-file", f"{path}: {error.strerror}") from None
    if len(text) > MAX_SCALING_BYTES:
        raise SettingError("--scaling-file", f"{path} is larger than {MAX_SCALING_BYTES} bytes")
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise SettingError("--scaling-file", f"{path} is not YAML") from None
    if not isinstance(document, dict | None):
        raise SettingError("--scaling-file", f"{path} must be a mapping")
    return document or {}
