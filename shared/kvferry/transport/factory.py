"""Chooses the backend."""

from __future__ import annotations

from typing import Final, Literal

import structlog

from kvferry.errors import SettingError, TransportUnavailable
from kvferry.runtime import Runtime
from kvferry.transport.base import Transport, TransportSettings
from kvferry.transport.tcp import TcpTransport
from kvferry.transport.ucx import UcxTransport

TransportKind = Literal["auto", "ucx", "tcp"]
TRANSPORT_KINDS: Final = ("auto", "ucx", "tcp")


def open_transport(kind: str, settings: TransportSettings, runtime: Runtime) -> Transport:
    """A transport that has yet to be started. `auto` is UCX where its library loads, else TCP.

    Raises `TransportUnavailable` where UCX is asked for and its library does not load, `SettingError` for
    another kind.
    """
    if kind not in TRANSPORT_KINDS:
        raise SettingError("transport", f"{kind!r} is none of {', '.join(TRANSPORT_KINDS)}")
    if kind != "tcp":
        try:
            return UcxTransport(settings, runtime)
        except TransportUnavailable as error:
            if kind == "ucx":
                raise
            structlog.get_logger(__name__).warning("UCX is not available, using TCP", reason=error.problem)
    return TcpTransport(settings, runtime)
