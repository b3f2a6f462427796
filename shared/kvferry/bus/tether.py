"""Run a program that ends with its parent, however the parent ends: `tether.py PARENT_PID PROGRAM [ARGUMENT…]`.

Linux signals a process when the thread that forked it dies, if that process has asked for it. The request has
to be made after the fork, where no Python may safely run in a parent with threads. So this small program is
started instead: it asks for itself and then becomes the program. On other systems it only becomes the program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def tethered(program: str, *arguments: str) -> list[str]:
    """The command line that runs a program tied to this process. Start it from a thread that lasts."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), program, *arguments]


def main() -> None:
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a frozen or wedged one, too
        if os.getppid() != parent:  # it ended before the request was made
            sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - the point of this program


if __name__ == "__main__":
    main()
