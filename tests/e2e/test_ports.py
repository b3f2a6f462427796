"""Which ports the processes of a stack listen on, and on which addresses."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from books import port_of
from stack import Stack


def test_every_port_is_a_known_one_and_bound_to_this_machine(stack: Stack) -> None:
    open_ports = {pid: listeners([pid]) for pid in stack.processes()}
    for row in stack.workers():
        ports = {port for _, port in open_ports.pop(row["pid"])}
        own = {row["debug_port"], int(row["address"][0].rsplit(":", 1)[1])}
        assert own < ports if row["transport"] == "ucx" else own == ports
        assert len(ports - own) == (row["transport"] == "ucx")  # UCX's TCP transport has a port of its own
    rest = {port for addresses in open_ports.values() for _, port in addresses}
    assert rest == {port_of(stack), int(stack.facts.nats_url.rsplit(":", 1)[1])}
    assert {address for address, _ in listeners(stack.processes())} == {"127.0.0.1"}


def test_a_port_that_is_open_to_all_would_be_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)) as planted:
        assert ("0.0.0.0", planted.getsockname()[1]) in listeners([os.getpid()])


def listeners(pids: Any) -> set[tuple[str, int]]:
    """(address, port) of every listening TCP socket of these processes: what `ss -ltnp` shows of them."""
    sockets = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(entry.readlink().name)
            except FileNotFoundError:
                continue
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found
