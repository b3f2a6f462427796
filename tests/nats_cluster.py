"""A real cluster of nats-servers on this machine, whose nodes a test may kill and start again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvferry.bus.rights import BusUser
from kvferry.bus.server import EmbeddedNats


class NatsCluster:
    """`nodes` know each other by their routes."""

    def __init__(self, users: Sequence[BusUser], size: int = 3) -> None:
        ports = _free_ports(size)
        self.nodes = [
            EmbeddedNats(
                users,
                options={
                    "server_name": f"node-{number}",
                    "cluster": {
                        "name": "test", "listen": f"127.0.0.1:{port}",
                        "routes": [f"nats-route://127.0.0.1:{other}" for other in ports if other != port],
                    },
                },
            )
            for number, port in enumerate(ports)
        ]  # fmt: skip

    @property
    def urls(self) -> str:
        """As KVFERRY_NATS_URL names them."""
        return ",".join(node.url for node in self.nodes)

    async def kill(self, number: int) -> None:
        os.kill(self.nodes[number].pid, signal.SIGKILL)
        await self.nodes[number].wait()


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


@asynccontextmanager
async def running_cluster(users: Sequence[BusUser], size: int = 3) -> AsyncIterator[NatsCluster]:
    cluster = NatsCluster(users, size)
    try:
        await asyncio.gather(*(node.start() for node in cluster.nodes))
        yield cluster
    finally:
        await asyncio.gather(*(node.stop() for node in cluster.nodes))
