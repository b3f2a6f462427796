"""Which torch is installed, whether or not an engine needs it."""

from __future__ import annotations

from typing import Final

from kvferry_local.doctor.finding import Finding, failed, ok
from kvferry_local.doctor.probe import ProbeFailed, probe
from kvferry_local.settings import DoctorSettings

INSTALL: Final = "pip install 'kvferry[worker]'"
# By force: pip takes another build of the same version for the one that is asked for.
INSTALL_CUDA: Final = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"


async def torch_build(settings: DoctorSettings, *, needed: bool) -> Finding:
    """`needed`: the native engine does not run all that is asked for."""
    check = "torch"
    try:
        answer = await probe("kvferry.engine.torch.probe")
    except ProbeFailed as error:
        answer = {"problem": str(error)}
    if "missing" in answer:
        if needed:
            return failed(check, "is not installed, and the native engine does not run this", INSTALL)
        return ok(check, "is not installed; the native engine runs without it")
    if "problem" in answer:
        return failed(check, f"is installed and can't be imported: {answer['problem']}", INSTALL)
    build, devices = answer["build"], answer["devices"]
    detail = f"{answer['version']}, built for {build}"
    if build != "CPUs":
        detail += f", sees {', '.join(devices) or 'no device'}"
    if settings.device.startswith("cuda") and build == "CPUs":
        return failed(check, f"{detail}, and --device is {settings.device}", INSTALL_CUDA)
    return ok(check, detail)
