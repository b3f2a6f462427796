"""Instruction sets: what each build of the library needs, and what this processor has.

The flags are the kernel's view (`/proc/cpuinfo`), so a register file that the system does not save counts as
missing. A machine that is not x86-64 Linux gets the portable build, whose code the compiler vectorises for it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kvferry.errors import SettingError

_V3: Final = frozenset(  # x86-64-v3 and what it contains, as Linux spells it
    (
        "cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3",
        "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave",
    )
)  # fmt: skip
_V4: Final = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Best first. Each name is what `kvf_isa()` of that build says.
_AVX512: Final = _V4 | {"avx512_bf16", "avx512_vnni"}
NEEDED_FLAGS: Final[Mapping[str, frozenset[str]]] = {
    "amx": _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512": _AVX512,
    "avx2": _V3,
    "portable": frozenset(),
}
CPUINFO: Final = Path("/proc/cpuinfo")


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Flags of the first processor; none where they cannot be read."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "flags":
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def usable_isas(flags: frozenset[str]) -> tuple[str, ...]:
    """Instruction sets that a processor with these flags has, best first; `portable` always."""
    return tuple(isa for isa, needed in NEEDED_FLAGS.items() if needed <= flags)


def isas_to_try(wanted: str, flags: frozenset[str]) -> tuple[str, ...]:
    """Builds that may be loaded for a setting ("auto" or a name), best first.

    Raises `SettingError` for a name that is unknown or that the processor lacks: loading it would end the
    process at the first instruction.
    """
    usable = usable_isas(flags)
    if wanted == "auto":
        return usable
    if wanted not in NEEDED_FLAGS:
        raise SettingError("isa", f"{wanted!r}, there are: auto, {', '.join(NEEDED_FLAGS)}")
    if wanted not in usable:
        missing = sorted(NEEDED_FLAGS[wanted] - flags)
        raise SettingError("isa", f"{wanted!r}, this processor lacks {', '.join(missing)}")
    return (wanted,)
