"""Bearer keys. Only their SHA-256 is kept; each has its own root of the prefix cache."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Final

from kvferry.errors import SettingError
from kvferry.log import get_logger

MAX_KEY_FILE_BYTES: Final = 1 << 20
MAX_KEYS: Final = 4096
_SALT_LABEL: Final = b"kvferry prefix cache"
_SETTING: Final = "--api-key-file"

log = get_logger(__name__)


class ApiKeys:
    """The keys of one file. Lines that are empty or start with # don't count."""

    def __init__(self, path: Path) -> None:
        """Raises `SettingError` if the file can't be read or holds no key: an open door must be no accident."""
        self._path = path
        self._version = self._stat()
        self._digests = self._read()

    def salt_of(self, authorization: bytes) -> bytes | None:
        """32 bytes, own to the key in an `Authorization` header; None if it is none of ours.

        The key is a secret of high entropy, so one round of SHA-256 is enough; all digests are compared,
        in constant time each, so that time tells nothing.
        """
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = False
        for other in self._digests:
            known |= hmac.compare_digest(digest, other)
        if not known or scheme.lower() != b"bearer":
            return None
        return hashlib.sha256(_SALT_LABEL + digest).digest()

    def refresh(self) -> None:
        """Read the file again if it has changed. What can't be read leaves the keys as they are."""
        try:
            version = self._stat()
            if version == self._version:
                return
            self._version = version
            self._digests = self._read()
        except SettingError as error:
            log.error("API keys kept as they were", problem=error.problem)
            return
        log.info("API keys read again", num_keys=len(self._digests))

    def _stat(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise SettingError(_SETTING, f"{self._path}: {error.strerror}") from None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> tuple[bytes, ...]:
        try:
            with self._path.open("rb") as file:
                text = file.read(MAX_KEY_FILE_BYTES + 1)
        except OSError as error:
            raise SettingError(_SETTING, f"{self._path}: {error.strerror}") from None
        keys = [line.strip() for line in text.splitlines()]
        keys = [key for key in keys if key and not key.startswith(b"#")]
        if len(text) > MAX_KEY_FILE_BYTES or len(keys) > MAX_KEYS:
            raise SettingError(_SETTING, f"{self._path} holds more than {MAX_KEYS} keys")
        if not keys:
            raise SettingError(_SETTING, f"{self._path} holds no key")
        return tuple(hashlib.sha256(key).digest() for key in keys)
