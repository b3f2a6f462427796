"""How the helper programs of benchmarks are told what to do: JSON lines on stdin, each answered by one on stdout."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any


async def commands() -> AsyncIterator[Any]:
    """Until stdin is closed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


def tell(**answer: Any) -> None:
    """The first one, before any command, says that the program is ready."""
    print(json.dumps(answer), flush=True)
