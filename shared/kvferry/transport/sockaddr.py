"""IP addresses in the form of the C socket API (Linux: the family in native order, the port in network order)."""

from __future__ import annotations

import ipaddress
import socket
import struct

from kvferry.errors import SettingError


def pack_sockaddr(host: str, port: int) -> bytes:
    """`struct sockaddr_in` or `sockaddr_in6` of a literal address. Raises `SettingError` for a host name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise SettingError("host", f"{host!r} is no IP address") from None
    if address.version == 4:
        return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + address.packed + bytes(8)
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + address.packed + bytes(4)


def unpack_port(sockaddr: bytes) -> int:
    """The port of either form."""
    (port,) = struct.unpack_from("!H", sockaddr, 2)
    return int(port)
