"""Which address of this machine others should connect to."""

from __future__ import annotations

import socket
from typing import Final
from urllib.parse import urlsplit

from kvferry.errors import SettingError

AUTO: Final = "auto"
NATS_PORT: Final = 4222
SETTING: Final = "--advertise-host"


def advertised_host(host: str, nats_url: str) -> str:
    """`host`, or for `auto` this machine's address on the way to NATS: the network that the cluster shares.

    Sends nothing: connecting a datagram socket only looks the route up. Raises `SettingError` if there is none.
    """
    if host != AUTO:
        return host
    problem = f"auto finds no way to {nats_url.rpartition('@')[2]}"
    for url in nats_url.split(","):
        try:
            parts = urlsplit(url.strip() if "://" in url else f"nats://{url.strip()}")
            if not parts.hostname:
                raise ValueError("no host")
            found = socket.getaddrinfo(parts.hostname, parts.port or NATS_PORT, type=socket.SOCK_DGRAM)
        except (OSError, ValueError) as error:
            problem = f"auto: {error}"
            continue
        for family, kind, _, _, address in found:
            with socket.socket(family, kind) as probe:
                try:
                    probe.connect(address)
                except OSError as error:
                    problem = f"auto: {error.strerror}"
                    continue
                return str(probe.getsockname()[0])
    raise SettingError(SETTING, f"{problem}; name the address")
