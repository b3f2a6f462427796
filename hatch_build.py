"""Build hook: a wheel carries each service's scaling.yaml inside its package, and the native engine, compiled here
for every instruction set of this kind of machine.

Without a compiler the wheel is a pure one: the workers then build the library at first use where they run, or fall
back to torch. An editable install builds nothing here; the first worker does.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("shared/kvferry/engine/native")
INSIDE_WHEEL = "kvferry/engine/native/lib"
SCALED = ("gateway", "prefill", "decode")


class NativeBuildHook(BuildHookInterface[Any]):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        for role in SCALED:
            source = Path(self.root) / "services" / role / "scaling.yaml"
            build_data["force_include"][str(source)] = f"kvferry_{role}/scaling.yaml"
        build = _load(Path(self.root) / NATIVE / "build.py")
        libraries = build.build_for_wheel(Path(self.root) / "build" / "native", self.app.display_warning)
        if not libraries:
            self.app.display_warning("the wheel carries no native engine: workers build it where they run")
            return
        for path in libraries:
            build_data["force_include"][str(path)] = f"{INSIDE_WHEEL}/{path.name}"
        build_data["pure_python"] = False
        # Any Python 3: the library is reached through ctypes.
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _load(path: Path) -> ModuleType:
    """The module alone: its package is not importable where wheels are built."""
    spec = importlib.util.spec_from_file_location("kvferry_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
