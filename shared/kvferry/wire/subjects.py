"""NATS subjects. Written by role, so that an account's permissions can be, too.

kvferry.<cluster>.<role>.<name>.<incarnation>             one per process: all messages to it
kvferry.<cluster>.beat.<role>.<name>.<incarnation>        heartbeats and exit notices
kvferry.<cluster>.cache.<role>.<name>.<incarnation>       what a worker's prefix cache stores and evicts
kvferry.<cluster>.inbox.<role>                            prefix of answers to requests
"""

from __future__ import annotations

import re
from typing import Final

from kvferry.errors import SettingError

ROOT: Final = "kvferry"
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_name(setting: str, name: str) -> str:
    """A name that may stand in a subject. Raises `SettingError`."""
    if not _TOKEN.fullmatch(name):
        raise SettingError(setting, f"{name!r} must be 1 to 64 letters, digits, '-' or '_'")
    return name


def process_subject(cluster: str, role: str, name: str, incarnation: int) -> str:
    return f"{ROOT}.{cluster}.{role}.{name}.{incarnation:016x}"


def beat_subject(cluster: str, role: str, name: str, incarnation: int) -> str:
    return f"{ROOT}.{cluster}.beat.{role}.{name}.{incarnation:016x}"


def all_beats(cluster: str) -> str:
    return f"{ROOT}.{cluster}.beat.>"


def role_beats(cluster: str, role: str) -> str:
    return f"{ROOT}.{cluster}.beat.{role}.>"


def cache_subject(cluster: str, role: str, name: str, incarnation: int) -> str:
    return f"{ROOT}.{cluster}.cache.{role}.{name}.{incarnation:016x}"


def all_cache_news(cluster: str) -> str:
    return f"{ROOT}.{cluster}.cache.>"


def inbox_prefix(cluster: str, role: str) -> str:
    return f"{ROOT}.{cluster}.inbox.{role}"
