"""The small HTTP port of a worker: /health, /ready, /metrics, /debug/blocks, /debug/digests.

It binds the worker's `host`; `/debug` answers loopback clients only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any, Final

import uvicorn
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvferry.errors import SettingError
from kvferry.http_port import BoundedProtocol, QuietServer
from kvferry.transport.slots import SlotState
from kvferry.worker.report import blocks, refresh_metrics
from kvferry.worker.worker import Worker

MAX_CONNECTIONS: Final = 64  # one more is closed at once
RECEIVE_TIMEOUT: Final = 10.0  # seconds for a request to arrive whole


def debug_app(worker: Worker[Any]) -> Starlette:
    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        return JSONResponse({"state": worker.state}, status_code=200 if worker.state == "ready" else 503)

    async def metrics(_: Request) -> Response:
        refresh_metrics(worker)
        return Response(worker.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def debug_blocks(request: Request) -> Response:
        if not _is_local(request):
            return JSONResponse({"error": "only from this machine"}, status_code=403)
        try:
            worker.check_integrity()
        except AssertionError as error:
            return JSONResponse({"error": f"the books do not add up: {error}"}, status_code=500)
        return JSONResponse({**blocks(worker), "shards": await shard_slots(worker)})

    async def digests(request: Request) -> Response:
        if not _is_local(request):
            return JSONResponse({"error": "only from this machine"}, status_code=403)
        return JSONResponse(worker.digests.rows())

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/debug/blocks", debug_blocks),
            Route("/debug/digests", digests),
        ]
    )


async def shard_slots(worker: Worker[Any]) -> dict[str, dict[SlotState, int] | None]:
    """Of its ranks on other hosts, whose KV lies in the same blocks: staging slots by state; None of one that says
    nothing."""
    counts = await asyncio.gather(*(shard.slot_counts() for shard in worker.shards))
    return {str(shard.rank): each for shard, each in zip(worker.shards, counts, strict=True)}


def _is_local(request: Request) -> bool:
    if request.client is None:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


class DebugServer:
    """Serves a worker's debug port until `stop`."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise SettingError("--debug-port", f"cannot listen on {host}:{port}: {error.strerror}") from None
        self.port: int = self._socket.getsockname()[1]
        self._server: QuietServer | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, worker: Worker[Any]) -> None:
        config = uvicorn.Config(
            debug_app(worker),
            http=BoundedProtocol.with_limits(RECEIVE_TIMEOUT, MAX_CONNECTIONS),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,  # who is local is read from the socket alone
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = QuietServer(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._socket]), name="debug port")

    async def stop(self) -> None:
        if self._server is not None and self._task is not None:
            self._server.end()
            await self._task
        self._socket.close()
