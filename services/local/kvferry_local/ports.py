"""Ports of the gateways: found or refused before a model is loaded for nothing."""

from __future__ import annotations

import contextlib
import errno
import socket

from kvferry.errors import SettingError


def claim(host: str, first: int, count: int) -> tuple[int, ...]:
    """`count` ports from `first` on, or any free ones for 0. Raises `SettingError` for one that is taken.

    Nothing is held: a port may be lost between this check and the gateway's start, which then fails itself.
    """
    with contextlib.ExitStack() as held:
        return tuple(_bind(held, host, first + index if first else 0) for index in range(count))


def _bind(held: contextlib.ExitStack, host: str, port: int) -> int:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise SettingError("--host", f"{host}: {error.strerror}") from None
    listener = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    # As the server does: a port in TIME_WAIT is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingError("--port", f"{port} is taken on {host}; choose another") from None
        setting = "--port" if error.errno == errno.EACCES else "--host"
        raise SettingError(setting, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return int(listener.getsockname()[1])


def base_url(host: str, port: int, scheme: str = "http") -> str:
    """Where a client on this machine reaches a gateway that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared only
    return f"{scheme}://[{reached}]:{port}" if ":" in reached else f"{scheme}://{reached}:{port}"
