"""Two networks on this machine, joined by a cable, as two hosts see them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

NETWORK: Final = "10.77.0"  # that of the tutorial
HOSTS: Final = (f"{NETWORK}.1", f"{NETWORK}.2")


@contextlib.contextmanager
def two_networks(folder: Path) -> Iterator[list[tuple[str, ...]]]:
    """What begins a command in the one at 10.77.0.1, and in the other at 10.77.0.2, joined by a cable between their
    `eth0`, with no other way out. Such a command runs in `folder`.

    Skips, with the reason, where network namespaces cannot be made.
    """
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(_namespace()) for _ in HOSTS]
        inside = [_inside(pid, folder) for pid in pids]
        _ip(inside[0], f"link add eth0 type veth peer name eth0 netns {pids[1]}")
        for prefix, host in zip(inside, HOSTS, strict=True):
            for command in ("link set lo up", f"addr add {host}/24 dev eth0", "link set eth0 up"):
                _ip(prefix, command)
        yield inside


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """The process that holds it. With a /sys that shows its devices, by which UCX finds them."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"no network namespaces: there is no {program} (iproute2, util-linux)")
    who = () if os.geteuid() == 0 else ("--map-root-user",)
    hold = "mount -t sysfs none /sys && echo held && exec sleep infinity"
    command = ["unshare", *who, "--net", "--mount", "sh", "-c", hold]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != "held\n":
                pytest.skip(f"no network namespaces: {holder.communicate()[1].strip()}")
            yield holder.pid
        finally:
            holder.kill()


def _inside(pid: int, folder: Path) -> tuple[str, ...]:
    """Begins a command there. In `folder`, for whoever enters a mount namespace is in its root."""
    who = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
    return ("nsenter", "--target", str(pid), "--net", "--mount", f"--wd={folder}", *who)


def _ip(prefix: Sequence[str], command: str) -> None:
    subprocess.run([*prefix, "ip", *command.split()], check=True, capture_output=True, timeout=30)
