"""Subjects and patterns as NATS knows them. Pure.

A subject is tokens joined by dots. In a pattern the token `*` stands for any one token and a last token `>`
for one or more.
"""

from __future__ import annotations

import re
from typing import Final

from kvferry.bus.base import InvalidSubject

MAX_SUBJECT_CHARS: Final = 1024
# Space and line ends would end the subject inside the protocol's control line.
_UNSAFE: Final = re.compile(r"[\s\x00-\x1f\x7f]")


def check_subject(subject: str) -> None:
    """Raises `InvalidSubject` for what may not be published to. Subjects come from other processes, too."""
    _tokens(subject)
    if "*" in subject or ">" in subject:
        raise InvalidSubject(subject)


def check_pattern(pattern: str) -> None:
    """Raises `InvalidSubject` for what may not be subscribed to."""
    tokens = _tokens(pattern)
    if ">" in tokens[:-1] or any(len(token) > 1 and ("*" in token or ">" in token) for token in tokens):
        raise InvalidSubject(pattern)


def matches(pattern: str, subject: str) -> bool:
    if "*" not in pattern:
        if pattern[-1] != ">":
            return pattern == subject
        return subject.startswith(pattern[:-1]) and len(subject) >= len(pattern)
    wanted = pattern.split(".")
    given = subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def _tokens(subject: str) -> list[str]:
    tokens = subject.split(".")
    if len(subject) > MAX_SUBJECT_CHARS or _UNSAFE.search(subject) or not all(tokens):
        raise InvalidSubject(subject)
    return tokens
