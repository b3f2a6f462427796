"""How a service tells its supervisor how far it is: JSON lines on an inherited pipe.

    {"event": "progress", "stage": "build" | "import" | "load" | "warm-up", …}
    {"event": "ready", "incarnation": …, …}

The pipe's descriptor number stands in `KVFERRY_READY_FD`. Without it (a service started by hand or by
another supervisor) reports go nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Final

READY_FD: Final = "KVFERRY_READY_FD"
MAX_REPORT_BYTES: Final = 4096  # PIPE_BUF: a write of at most this is atomic


def report(stage: str, **fields: str | int | float) -> None:
    """Tell the supervisor. `stage` is "ready" (with `incarnation`) or what the service does before that.

    Never raises and never blocks for long: a supervisor that is gone or asleep must not stop a service.
    """
    if not (descriptor := os.environ.get(READY_FD, "")).isdecimal():
        return
    head = {"event": "ready"} if stage == "ready" else {"event": "progress", "stage": stage}
    line = json.dumps({**head, **fields}).encode() + b"\n"
    if len(line) <= MAX_REPORT_BYTES:
        with contextlib.suppress(OSError):
            os.write(int(descriptor), line)
