"""Secrets in files. No error quotes one."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from kvferry.errors import SettingError

MAX_SECRET_CHARS: Final = 4096


def read_secret(path: Path, setting: str) -> str:
    """Its first line. Raises `SettingError`."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_SECRET_CHARS + 1)
    except OSError as error:
        raise SettingError(setting, f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingError(setting, f"{path} is not UTF-8") from None
    if len(text) > MAX_SECRET_CHARS:
        raise SettingError(setting, f"{path} is longer than {MAX_SECRET_CHARS} characters")
    return text.partition("\n")[0].rstrip("\r")


def check_private(status: os.stat_result, path: Path, setting: str) -> None:
    """Ours, and nobody else's to read or to write. Raises `SettingError`."""
    if not stat.S_ISREG(status.st_mode):
        raise SettingError(setting, f"{path} is no regular file")
    if status.st_uid != os.geteuid():
        raise SettingError(setting, f"{path} belongs to another user")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingError(setting, f"{path} is open to other users; run: chmod 600 {path}")
