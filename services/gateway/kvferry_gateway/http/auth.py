"""Bearer keys. Only their SHA-256 is kept; each has its own root of the prefix cache, and may have rate limits.

A line of the key file is a key, and behind it, if it is to have limits of its own, `requests_per_minute=60` or
`tokens_per_minute=100000` or both; `unlimited` for a number lifts the gateway's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvferry.errors import SettingError
from kvferry.file_version import version_of
from kvferry.log import get_logger
from kvferry_gateway.http.rate_limit import NO_LIMITS, Allowance, RateLimits

MAX_KEY_FILE_BYTES: Final = 1 << 20
MAX_KEYS: Final = 4096
_SALT_LABEL: Final = b"kvferry prefix cache"
_SETTING: Final = "--api-key-file"
_LIMIT: Final = re.compile(rb"(requests|tokens)_per_minute=(?:([1-9][0-9]{0,14})|unlimited)")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key stands for."""

    salt: bytes  # 32 bytes: root of its prefix cache
    allowance: Allowance


def lines_of(path: Path) -> list[tuple[int, list[bytes]]]:
    """Numbers and words of the lines that count. Raises `SettingError`."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise SettingError(_SETTING, f"{path}: {error.strerror}") from None
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, words) for number, words in lines if words and not words[0].startswith(b"#")]
    if len(text) > MAX_KEY_FILE_BYTES or len(lines) > MAX_KEYS:
        raise SettingError(_SETTING, f"{path} holds more than {MAX_KEYS} keys")
    if not lines:
        raise SettingError(_SETTING, f"{path} holds no key")
    return lines


def first_key(path: Path) -> bytes:
    """For who may read the file, as `kvferry up` does to see its own gateway. Raises `SettingError`."""
    return lines_of(path)[0][1][0]


class ApiKeys:
    """The keys of one file. Lines that are empty or start with # don't count."""

    def __init__(self, path: Path, limits: RateLimits = NO_LIMITS) -> None:
        """`limits`: of keys whose line gives none. Raises `SettingError` if the file can't be read or holds no key: an
        open door must be no accident."""
        self._path = path
        self._limits = limits
        self._version = version_of(path)
        self._keys: dict[bytes, ApiKey] = {}  # by digest
        self._keys = self._read()

    def find(self, authorization: bytes) -> ApiKey | None:
        """The key in an `Authorization` header; None if it is none of ours.

        The key is a secret of high entropy, so one round of SHA-256 is enough; all digests are compared,
        in constant time each, so that time tells nothing.
        """
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for other, known in self._keys.items():
            if hmac.compare_digest(digest, other):
                found = known
        return found if scheme.lower() == b"bearer" else None

    def refresh(self) -> None:
        """Read the file again if it has changed. What can't be read leaves the keys as they are."""
        version = version_of(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = self._read()
        except SettingError as error:
            log.error("API keys kept as they were", problem=error.problem)
            return
        log.info("API keys read again", num_keys=len(self._keys))

    def _read(self) -> dict[bytes, ApiKey]:
        keys: dict[bytes, ApiKey] = {}
        for number, (key, *given) in lines_of(self._path):
            digest = hashlib.sha256(key).digest()
            made = self._key_of(digest, self._limits_of(given, number))
            if keys.setdefault(digest, made).allowance.limits != made.allowance.limits:
                raise SettingError(_SETTING, f"{self._path}, line {number}: a key again, with other limits")
        return keys

    def _key_of(self, digest: bytes, limits: RateLimits) -> ApiKey:
        """As it was, where its limits are: what it has used still counts."""
        before = self._keys.get(digest)
        if before is not None and before.allowance.limits == limits:
            return before
        return ApiKey(hashlib.sha256(_SALT_LABEL + digest).digest(), Allowance(limits))

    def _limits_of(self, given: list[bytes], number: int) -> RateLimits:
        found: dict[bytes, int | None] = {}
        for word in given:
            limit = _LIMIT.fullmatch(word)
            if limit is None or limit[1] in found:
                # The word may be a part of a key: it is not shown.
                raise SettingError(
                    _SETTING,
                    f"{self._path}, line {number}: behind a key only requests_per_minute=N and tokens_per_minute=N, "
                    "once each; N is a number from 1, or unlimited",
                )
            found[limit[1]] = None if limit[2] is None else int(limit[2])
        return RateLimits(
            found.get(b"requests", self._limits.requests),
            found.get(b"tokens", self._limits.tokens),
        )
