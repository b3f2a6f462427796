"""TLS contexts from PEM files. Whatever is wrong with a file names the setting that it came by."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from kvferry.errors import SettingError
from kvferry.file_version import version_of
from kvferry.log import get_logger

MIN_VERSION: Final = ssl.TLSVersion.TLSv1_2
GATEWAY_SETTINGS: Final = ("--tls-cert", "--tls-key", "KVFERRY_TLS_KEY_PASSWORD")

log = get_logger(__name__)


class _Encrypted(Exception):
    """Raised from inside OpenSSL's question for a password, which would else go to the terminal."""


def client_context(authority: str, setting: str) -> ssl.SSLContext:
    """Trusts whom `authority` (a PEM file) has signed; where that is empty, whom the system trusts.

    Raises `SettingError`.
    """
    try:
        context = ssl.create_default_context(cafile=authority or None)
    except OSError as error:
        raise SettingError(setting, f"{authority}: {_problem(error)}") from None
    context.minimum_version = MIN_VERSION
    return context


def pinned_context(certificate: Path, setting: str) -> ssl.SSLContext:
    """Trusts this very certificate, under whatever name its server is reached: for one on this machine.

    Raises `SettingError`.
    """
    context = client_context(str(certificate), setting)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not have signed itself
    return context


class ServerCertificate:
    """What a gateway shows. A connection keeps the certificate that it began with."""

    def __init__(self, certificate: Path, key: Path | None, password: SecretStr) -> None:
        """The key may be in the certificate's file. Raises `SettingError`."""
        self._certificate = certificate
        self._key = key or certificate
        self._password = password
        self._version = version_of(self._certificate, self._key)
        self._shown = self._read()
        self.context: Final = _server_context()
        # As a server of several hosts chooses among theirs: so a new certificate replaces the old one as a whole. In
        # a context that is in use it could be left beside the old one's key.
        self.context.sni_callback = self._show

    def refresh(self) -> None:
        """Read the files again if they have changed. What is no certificate leaves the old one in its place."""
        version = version_of(self._certificate, self._key)
        if version == self._version:
            return
        self._version = version
        try:
            self._shown = self._read()
        except SettingError as error:
            log.error("certificate kept as it was", problem=str(error))
            return
        log.info("certificate read again", file=str(self._certificate))

    def _show(self, connection: ssl.SSLObject, _host: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._shown

    def _read(self) -> ssl.SSLContext:
        context = _server_context()
        password = self._password.get_secret_value()
        show_certificate(context, str(self._certificate), str(self._key), password, GATEWAY_SETTINGS)
        return context


def _server_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = MIN_VERSION
    return context


def show_certificate(
    context: ssl.SSLContext, certificate: str, key: str, password: str, settings: tuple[str, str, str]
) -> None:
    """Our own certificate (with those that lead to its authority behind it) and its key. Raises `SettingError`.

    `settings`: the names of certificate, key and password; the last one is empty where there is no such setting.
    """
    certificate_setting, key_setting, password_setting = settings
    for setting, path in ((certificate_setting, certificate), (key_setting, key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise SettingError(setting, f"{path}: {error.strerror}") from None

    def answer() -> str:
        if not password:
            raise _Encrypted
        return password

    try:
        context.load_cert_chain(certificate, key, answer)
    except _Encrypted:
        remedy = f"set {password_setting}" if password_setting else "give one that is not"
        raise SettingError(key_setting, f"{key} is encrypted; {remedy}") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingError(key_setting, f"{key} is not the key of {certificate}") from None
        if password:
            raise SettingError(key_setting, f"{key} can't be read with {password_setting}") from None
        raise SettingError(certificate_setting, f"{certificate}, {key}: {_problem(error)}") from None


def _problem(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return "no PEM file of the kind that is needed"
    return error.strerror or str(error)
