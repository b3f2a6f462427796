"""Linear layers, vectors and threads of the native engine, by a C++ program that is built for each instruction set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from native.compiling import COMPILER, HERE, ISAS, RACES, SANITIZED, SPLIT_K, Compiled, engine, product, run

ENGINE = engine(
    "threads", "arena", "pack", "quantize", "tile_amx", "tile_bf16", "tile_int8", "epilogue", "gemm", "peaks"
)
SOURCES = (*ENGINE, *sorted(HERE.glob("linear_*.cpp")))
TESTS = ("vectors", "quantizing", "reference", "rows", "threads", "peaks")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


def program(compiled: Compiled, isa: str) -> Path:
    return compiled.program(product(isa), SOURCES)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("isa", ISAS)
def test_linear_layers_are_right_and_each_row_has_its_own_bits(compiled: Compiled, isa: str, test: str) -> None:
    assert f"{isa}: {test} passed" in run([program(compiled, isa), test])


def test_every_instruction_set_has_the_same_int8_codes_and_sums(compiled: Compiled) -> None:
    digests = {run([program(compiled, isa), "integers"]).splitlines()[0] for isa in ISAS}
    assert len(digests) == 1


def test_a_build_that_splits_k_by_the_number_of_rows_is_found_out(compiled: Compiled) -> None:
    split = compiled.program(product(ISAS[0]), SOURCES, own=SPLIT_K)
    run([split, "reference"])  # its values are right: only the order differs
    assert "differs in one call" in run([split, "rows"], fails=True)


def test_no_access_is_out_of_bounds_and_no_behaviour_undefined(compiled: Compiled) -> None:
    sanitized = compiled.program(SANITIZED, SOURCES)
    for test in TESTS:
        run([sanitized, test, "small"])
    assert "ERROR: AddressSanitizer" in run([sanitized, "overrun"], fails=True)


def test_threads_have_no_data_race(compiled: Compiled) -> None:
    watched = compiled.program(RACES, SOURCES)
    for test in ("threads", "rows"):
        run([watched, test, "small"])


def test_the_same_sources_work_on_64_bit_arm(compiled: Compiled) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs a cross compiler for 64-bit Arm and its emulator (g++-aarch64-linux-gnu, qemu-user)")
    arm = compiled.program(["-static"], SOURCES, compiler=compiler)
    for test in ("vectors", "quantizing", "reference", "rows"):
        assert f"portable: {test} passed" in run([emulator, arm, test, "small"])
    here = run([program(compiled, "portable"), "integers"])
    assert run([emulator, arm, "integers"]) == here
