"""What the loaded UCX has, and a real transfer over each backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from kvferry_local.doctor.finding import Finding, failed, ok, warning
from kvferry_local.doctor.probe import ProbeFailed, probe
from kvferry_local.settings import DoctorSettings

MODULE: Final = "kvferry.transport.probe"
SLOW_BYTES_PER_S: Final = 200e6
NO_UCX: Final = "pip install 'kvferry[ucx]', or --transport tcp"
# Names of UCX's transports over InfiniBand and RoCE.
RDMA: Final = ("rc_", "ud_", "dc_", "rc/", "ud/", "dc/")


async def data_plane(settings: DoctorSettings) -> AsyncIterator[Finding]:
    if settings.transport in ("auto", "ucx"):
        async for finding in _ucx(settings):
            yield finding
    if settings.transport in ("auto", "tcp"):
        try:
            answer = await probe(MODULE, "tcp", settings.ucx_net_devices)
        except ProbeFailed as error:
            yield failed("tcp transfer", str(error), "--transport ucx")
        else:
            yield _transfer("tcp transfer", answer)


async def _ucx(settings: DoctorSettings) -> AsyncIterator[Finding]:
    must = failed if settings.transport == "ucx" else warning  # auto falls back to TCP
    try:
        answer = await probe(MODULE, "ucx", settings.ucx_net_devices)
    except ProbeFailed as error:
        yield must("ucx", str(error), "--transport tcp")
        return
    found: list[str] = answer.get("transports", [])
    if found:
        rdma = any(name.startswith(RDMA) for name in found)
        wires = "with RDMA" if rdma else "without RDMA (InfiniBand and RoCE need a system UCX with verbs)"
        yield ok("ucx", f"{answer['version']}, {wires}: {', '.join(found)}")
        yield _transfer("ucx transfer", answer)
    else:
        yield must("ucx", answer.get("problem", "UCX finds nothing to use"), NO_UCX)


def _transfer(check: str, answer: dict[str, Any]) -> Finding:
    if "problem" in answer:
        return failed(check, answer["problem"], answer["setting"])
    speed = answer["bytes_per_s"]
    detail = f"{speed / 1e9:.2f} GB/s over loopback, every byte right"
    if speed < SLOW_BYTES_PER_S:
        return warning(check, detail, "free a core; look at UCX_TLS and UCX_NET_DEVICES in the environment")
    return ok(check, detail)
