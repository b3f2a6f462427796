"""Where requests go, and a whole answer from there."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from kvferry.errors import SettingError
from kvferry_local.bench.sse import read_body, read_head

MAX_LINE_BYTES: Final = 1 << 22
MAX_DETAIL_CHARS: Final = 200
ANSWER_TIMEOUT_S: Final = 10.0


class ServerError(Exception):
    """The server answered with an error, or its stream ended with one. `kind` is what such are counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail[:MAX_DETAIL_CHARS]


class Refused(ServerError):
    """The server answered with a status other than 200: nothing began."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}", body.decode(errors="replace"))
        self.status = status


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int
    path: str = ""  # before that of each request
    tls: ssl.SSLContext | None = None
    api_key: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: str, api_key: str, tls: ssl.SSLContext | None = None) -> Endpoint:
        """An OpenAI-compatible API: its path ends in /v1, whether the URL does or not.

        `tls`: whom to trust, instead of the system's authorities.
        Raises `SettingError` for what is no http or https URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            raise SettingError("--url", f"{url!r} is no http or https URL") from None
        if not parts.hostname:
            raise SettingError("--url", f"{url!r} names no host")
        path = parts.path.rstrip("/")
        context = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        return cls(parts.hostname, port, path if path.endswith("/v1") else f"{path}/v1", context, api_key)

    def head(self, method: str, path: str, length: int, headers: Mapping[str, str] | None = None) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = {
            "Host": f"{host}:{self.port}",
            "Connection": "close",
            "Accept": "*/*",
            "Content-Type": "application/json",
            "Content-Length": str(length),
            **({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}),
            **(headers or {}),
        }
        fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{method} {self.path}{path} HTTP/1.1\r\n{fields}\r\n".encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=MAX_LINE_BYTES)

    async def get(self, path: str, timeout: float = ANSWER_TIMEOUT_S) -> bytes:
        """Raises `Refused`, OSError, TimeoutError, asyncio.IncompleteReadError."""
        async with asyncio.timeout(timeout):
            reader, writer = await self.connect()
            try:
                writer.write(self.head("GET", path, 0))
                status, headers = await read_head(reader)
                body = await read_body(reader, headers)
            finally:
                writer.close()
        if status != 200:
            raise Refused(status, body)
        return body

    async def get_json(self, path: str, timeout: float = ANSWER_TIMEOUT_S) -> Any:
        """As `get`; ValueError for what is no JSON."""
        return json.loads(await self.get(path, timeout))
