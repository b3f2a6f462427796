"""A client of a running stack: where its gateway is, and one-line errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from kvferry.config.layers import load_settings
from kvferry.errors import KvferryError, SettingError
from kvferry.runfile import RunFile, default_run_file
from kvferry_local.settings import ClientSettings
from kvferry_local.trust import SETTING, trust

# A proxy from the environment must not see requests to this machine.
TRUST_ENV: Final = False


class RequestFailed(KvferryError):
    """The gateway refused or could not be reached."""


@dataclass(frozen=True, slots=True)
class Target:
    """The stack that a command talks to."""

    url: str
    run_file: RunFile | None
    model: str  # empty: ask the gateway

    def open(self, settings: ClientSettings, timeout: httpx.Timeout) -> httpx.Client:
        return httpx.Client(**self._options(settings), timeout=timeout, trust_env=TRUST_ENV)

    def open_async(self, settings: ClientSettings, timeout: httpx.Timeout) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options(settings), timeout=timeout, trust_env=TRUST_ENV)

    def _options(self, settings: ClientSettings) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "headers": _headers(settings),
            "verify": trust(self.url, settings.tls_ca, self.run_file),
        }


def _headers(settings: ClientSettings) -> dict[str, str]:
    key = settings.api_key.get_secret_value()
    return {"authorization": f"Bearer {key}"} if key else {}


def client_settings(config_file: Path | None, flags: Mapping[str, Any]) -> ClientSettings:
    return load_settings(ClientSettings, config_file=config_file, environ=os.environ, flags=flags)


def find_target(settings: ClientSettings, *, need_run_file: bool = False) -> Target:
    """Raises `SettingError` when neither `--url` nor a run file leads to a gateway."""
    if settings.url and not need_run_file:
        return Target(settings.url.rstrip("/"), None, "")
    path = settings.run_file or default_run_file(os.environ, settings.cluster)
    run_file = RunFile.read(path, "--run-file")
    if not run_file.gateways:
        raise SettingError("--run-file", f"{path} names no gateway")
    return Target((settings.url or run_file.gateways[0]).rstrip("/"), run_file, run_file.first_model)


@contextmanager
def request_errors(url: str) -> Iterator[None]:
    """HTTP and network failures as `RequestFailed`."""
    try:
        yield
    except httpx.TransportError as error:
        detail = str(error) or type(error).__name__
        remedy = f"give {SETTING}" if "CERTIFICATE_VERIFY_FAILED" in detail else "is `kvferry up` running?"
        raise RequestFailed(f"--url: no answer from {url} ({detail}); {remedy}") from None


def check(response: httpx.Response) -> None:
    """Raises `RequestFailed` with the server's own message for anything but 2xx. The body must have been read."""
    if response.is_success:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise RequestFailed(f"HTTP {response.status_code}: {message}")
