"""Runs a probe, a program of its own that prints one line of JSON: one that crashes is a finding and no more."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any, Final

from kvferry_local.plan import PYTHON

TIMEOUT_S: Final = 300.0  # a large model is loaded, a library compiled
MAX_DETAIL_CHARS: Final = 300


class ProbeFailed(Exception):
    """It said nothing that can be used."""


async def probe(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module` answers. Raises `ProbeFailed`."""
    process = await asyncio.create_subprocess_exec(
        *PYTHON, module, *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, problem = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise ProbeFailed(f"no end after {TIMEOUT_S:g} s") from None
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        raise ProbeFailed(_why(process.returncode or 0, problem)) from None
    if not isinstance(answer, dict):
        raise ProbeFailed("it answers nothing that can be used")
    return answer


def _why(returncode: int, problem: bytes) -> str:
    if returncode < 0:
        return f"it was ended by {signal.Signals(-returncode).name}"
    lines = problem.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"it ended with {returncode}: {last}"[:MAX_DETAIL_CHARS]
