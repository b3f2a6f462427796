"""YAML files that a user writes: bounded, safe, a mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from kvferry.errors import SettingError

MAX_YAML_BYTES: Final = 1 << 20


def read_mapping(path: Path, setting: str) -> dict[str, Any]:
    """The file's mapping, empty for an empty file. Raises `SettingError` under the name `setting`."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise SettingError(setting, f"{path} is larger than {MAX_YAML_BYTES} bytes")
        document = yaml.safe_load(text)
    except OSError as error:
        raise SettingError(setting, f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise SettingError(setting, f"{path} is not YAML{where}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingError(setting, f"{path} must be a mapping")
    return document
