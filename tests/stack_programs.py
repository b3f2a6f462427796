"""Small real programs for the supervisor's tests."""

from __future__ import annotations

import sys

from kvferry_local.process import Program
from kvferry_local.supervision import Role

GOOD = """
import signal, sys
from kvferry.ready import report
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
report("load")
print("a line of output", flush=True)
report("ready", incarnation={incarnation})
while True:
    signal.pause()
"""

STUBBORN = """
import signal
from kvferry.ready import report
signal.signal(signal.SIGTERM, signal.SIG_IGN)
report("ready", incarnation=9)
while True:
    signal.pause()
"""

BROKEN = """
import sys
sys.stderr.write("kvferry: --dtype: no such thing\\n")
sys.exit(2)
"""


def program(name: str, role: Role, source: str = GOOD, incarnation: int = 1) -> Program:
    text = source.replace("{incarnation}", str(incarnation))
    return Program(name, role, (sys.executable, "-c", text), {"LANG": "C.UTF-8"})
