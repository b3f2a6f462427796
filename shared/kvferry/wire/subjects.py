"""NATS subjects. Written by role, so that an account's permissions can be, too (`kvferry.bus.rights`).

kvferry.<cluster>.<role>.<name>.<incarnation>.<sender's role>   one per process: all messages to it
kvferry.<cluster>.beat.<role>.<name>.<incarnation>              heartbeats, by the process itself
kvferry.<cluster>.exit.<role>.<name>.<incarnation>              its supervisor says that it has ended
kvferry.<cluster>.cache.<role>.<name>.<incarnation>             what a worker's prefix cache stores and evicts
kvferry.<cluster>.inbox.<role>                                  prefix of answers to requests

Who speaks is shown by the subject, which the server holds every role to, not by the message alone: a receiver compares
the two (`check_origin`).
"""

from __future__ import annotations

import re
from typing import Final

from kvferry.errors import Impostor, SettingError

ROOT: Final = "kvferry"
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_name(setting: str, name: str) -> str:
    """A name that may stand in a subject. Raises `SettingError`."""
    if not _TOKEN.fullmatch(name):
        raise SettingError(setting, f"{name!r} must be 1 to 64 letters, digits, '-' or '_'")
    return name


def check_origin(subject: str, *claimed: str) -> None:
    """Raises `Impostor` unless a message came on one of the subjects of the process that it says it is from."""
    if subject not in claimed:
        raise Impostor(f"it came on {subject[:128]!r} and claims {' or '.join(claimed)!r}")


def process_subject(cluster: str, role: str, name: str, incarnation: int) -> str:
    """What all subjects of messages to one process begin with."""
    return f"{ROOT}.{cluster}.{role}.{name}.{incarnation:016x}"


def mail_subject(process: str, sender: str) -> str:
    """Where processes of the role `sender` write to a process."""
    return f"{process}.{sender}"


def all_mail(process: str) -> str:
    return f"{process}.*"


def sender_of(subject: str) -> str:
    """The role that a message to this process is from."""
    return subject.rpartition(".")[2]


def role_mail(cluster: str, role: str, sender: str) -> str:
    """What a sender of one role writes to all processes of another."""
    return f"{ROOT}.{cluster}.{role}.*.*.{sender}"


def role_mailboxes(cluster: str, role: str) -> str:
    """What anybody writes to processes of a role."""
    return f"{ROOT}.{cluster}.{role}.*.*.*"


def beat_subject(cluster: str, role: str, name: str, incarnation: int) -> str:
    return f"{ROOT}.{cluster}.beat.{role}.{name}.{incarnation:016x}"


def role_beats(cluster: str, role: str) -> str:
    return f"{ROOT}.{cluster}.beat.{role}.>"


def exit_subject(cluster: str, role: str, name: str, incarnation: int) -> str:
    return f"{ROOT}.{cluster}.exit.{role}.{name}.{incarnation:016x}"


def all_exits(cluster: str) -> str:
    return f"{ROOT}.{cluster}.exit.>"


def cache_subject(cluster: str, role: str, name: str, incarnation: int) -> str:
    return f"{ROOT}.{cluster}.cache.{role}.{name}.{incarnation:016x}"


def role_cache_news(cluster: str, role: str) -> str:
    return f"{ROOT}.{cluster}.cache.{role}.>"


def all_cache_news(cluster: str) -> str:
    return f"{ROOT}.{cluster}.cache.>"


def inbox_prefix(cluster: str, role: str) -> str:
    return f"{ROOT}.{cluster}.inbox.{role}"
