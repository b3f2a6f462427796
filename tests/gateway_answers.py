"""Asking a gateway over HTTP, and what it answers."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from scripted_worker import Cluster

ANSWER = "Grüße 😀, end."


async def post(cluster: Cluster, path: str, body: Any, **headers: str) -> httpx.Response:
    return await cluster.client.post(path, json=body, headers=headers)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def raw(cluster: Cluster, *sent: bytes) -> bytes:
    """What comes back for bytes on a new connection, until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.http.address[1])
    try:
        for part in sent:
            writer.write(part)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()
