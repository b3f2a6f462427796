"""Ports and shared memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from kvferry.errors import SettingError
from kvferry_local.doctor.finding import Finding, failed, ok, warning
from kvferry_local.ports import claim

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - looked at only
LEAST_SHARED_BYTES: Final = 64 << 20  # what UCX's shared-memory transports and torch's workers may take


def ports(host: str, port: int, gateways: tuple[str, ...]) -> Finding:
    """`gateways`: those of a stack that runs; its ports are taken by right."""
    check = "ports"
    if gateways:
        return ok(check, f"a stack of this cluster runs on {', '.join(gateways)}")
    try:
        claim(host, port, 1)
    except SettingError as error:
        return failed(check, error.problem, error.setting)
    return ok(check, f"{host}:{port} is free" if port else f"{host} can be listened on")


def shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    check = "shared memory"
    remedy = f"mount a tmpfs at {folder}; in a container --shm-size 256m"
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return warning(check, f"{folder}: {error.strerror}", remedy)
    detail = f"{free / 1e6:,.0f} MB free in {folder}"
    return ok(check, detail) if free >= LEAST_SHARED_BYTES else warning(check, detail, remedy)
