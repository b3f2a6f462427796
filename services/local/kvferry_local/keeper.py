"""Keeps what must be single: the embedded NATS server alive, the run file one stack's own."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvferry.bus.server import EmbeddedNats
from kvferry.errors import BusUnavailable, SettingError
from kvferry.log import get_logger

RETRY_S: Final = 1.0

log = get_logger(__name__)


async def keep_running(server: EmbeddedNats) -> None:
    """Start the server again, on its own port, whenever it dies. Ends only by being cancelled."""
    while True:
        returncode = await server.wait()
        log.warning("nats-server ended; starting it again", returncode=returncode)
        while True:
            try:
                await server.start()
                break
            except BusUnavailable as error:
                log.error("nats-server does not start", error=str(error))
                await asyncio.sleep(RETRY_S)


@contextlib.contextmanager
def sole_owner(run_file: Path) -> Iterator[None]:
    """Hold the run file's lock; the kernel lets go of it however this process ends, so it is never stale.

    Raises `SettingError` if another stack holds it.
    """
    try:
        run_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(run_file.with_name(run_file.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingError("--run-file", f"{run_file}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingError(
                "--run-file", f"{run_file} belongs to a stack that is running; give this one a --cluster of its own"
            ) from None
        try:
            yield
        finally:
            run_file.unlink(missing_ok=True)
    finally:
        os.close(lock)
