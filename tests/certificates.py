"""Certificates made on the spot: an authority, and what it signs, as PEM files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Certificate:
    """PEM files of one certificate."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates of servers and of clients. Its own is `certificate`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(self.certificate)

    def sign(self, name: str, host: str = LOOPBACK, *, expired: bool = False, password: str = "") -> Certificate:
        """Files that begin with `name`, for a host's name or address."""
        ended = datetime.now(UTC) - timedelta(days=1) if expired else None
        began = datetime.now(UTC) - timedelta(days=2) if expired else None
        issued = self._authority.issue_cert(host, not_before=began, not_after=ended)
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(made.certificate)
        made.key.write_bytes(_locked(issued.private_key_pem.bytes(), password))
        made.key.chmod(0o600)
        return made


def _locked(key: bytes, password: str) -> bytes:
    if not password:
        return key
    form = BestAvailableEncryption(password.encode())
    return load_pem_private_key(key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, form)
