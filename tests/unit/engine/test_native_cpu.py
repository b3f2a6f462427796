"""Which builds a processor may load: never one whose instructions it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.engine.native.build import ISA_FLAGS
from kvferry.engine.native.cpu import NEEDED_FLAGS, cpu_flags, isas_to_try, usable_isas
from kvferry.errors import SettingError

FULL = NEEDED_FLAGS["amx"]


def test_a_full_processor_has_all_best_first() -> None:
    assert usable_isas(FULL) == ("amx", "avx512", "avx2", "portable")
    assert isas_to_try("auto", FULL) == usable_isas(FULL)


@pytest.mark.parametrize("flag", sorted(FULL))
def test_every_flag_counts(flag: str) -> None:
    expected = tuple(isa for isa, needed in NEEDED_FLAGS.items() if flag not in needed)
    assert expected[-1] == "portable"
    assert usable_isas(FULL - {flag}) == expected


def test_a_processor_without_flags_has_the_portable_build() -> None:
    assert usable_isas(frozenset()) == ("portable",)


def test_a_named_instruction_set_that_the_processor_lacks_is_refused_by_name() -> None:
    assert isas_to_try("avx2", FULL) == ("avx2",)
    with pytest.raises(SettingError, match="avx512_bf16") as error:
        isas_to_try("avx512", FULL - {"avx512_bf16"})
    assert error.value.setting == "isa"
    with pytest.raises(SettingError, match="there are: auto, amx, avx512, avx2, portable"):
        isas_to_try("sse9", FULL)


def test_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A flags: B\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags: fma\n")
    assert cpu_flags(cpuinfo) in (frozenset({"fpu", "avx2"}), frozenset())  # the latter on no x86-64
    assert cpu_flags(tmp_path / "nothing") == frozenset()


def test_every_instruction_set_can_be_built() -> None:
    assert list(ISA_FLAGS) == list(NEEDED_FLAGS)
