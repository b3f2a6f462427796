"""Runs a probe, a program of its own that prints one line of JSON: one that crashes is a finding and no more."""

from __future__ import annotations

import json
import signal
from typing import Any, Final

from kvferry_local.plan import PYTHON
from kvferry_local.process import outcome_of

TIMEOUT_S: Final = 300.0  # a large model is loaded, a library compiled
MAX_DETAIL_CHARS: Final = 300


class ProbeFailed(Exception):
    """It said nothing that can be used."""


async def probe(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module` answers. Raises `ProbeFailed`."""
    try:
        returncode, out, problem = await outcome_of((*PYTHON, module, *arguments), TIMEOUT_S)
    except TimeoutError:
        raise ProbeFailed(f"no end after {TIMEOUT_S:g} s") from None
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        raise ProbeFailed(_why(returncode, problem)) from None
    if not isinstance(answer, dict):
        raise ProbeFailed("it answers nothing that can be used")
    return answer


def _why(returncode: int, problem: bytes) -> str:
    if returncode < 0:
        return f"it was ended by {signal.Signals(-returncode).name}"
    lines = problem.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"it ended with {returncode}: {last}"[:MAX_DETAIL_CHARS]
