"""Whom a client of a gateway trusts over HTTPS."""

from __future__ import annotations

import ssl
from pathlib import Path

from kvferry.certificate import client_context, pinned_context
from kvferry.runfile import RunFile

SETTING = "--tls-ca"


def trust(url: str, authority: Path | None, run_file: RunFile | None = None) -> ssl.SSLContext:
    """The authority that was named; else, for a stack of this machine, its very certificate; else the system's
    authorities. For http it is of no use and does no harm.

    Raises `SettingError`.
    """
    if authority is None and run_file is not None and run_file.gateway_certificate and url in run_file.gateways:
        return pinned_context(Path(run_file.gateway_certificate), "--run-file")
    return client_context(str(authority or ""), SETTING)
