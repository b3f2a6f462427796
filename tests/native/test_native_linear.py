"""Linear layers, vectors and threads of the native engine, by a C++ program that is built for each instruction set."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvferry.engine.native.build import FLAGS, ISA_FLAGS, SOURCES, buildable_isas, find_compilers
from kvferry.engine.native.cpu import cpu_flags, usable_isas

COMPILER = next(iter(find_compilers()), None)
ISAS = [isa for isa in usable_isas(cpu_flags()) if isa in buildable_isas()]
ENGINE = [
    SOURCES / f"{name}.cpp"
    for name in ("threads", "arena", "pack", "quantize", "tile_bf16", "tile_int8", "epilogue", "gemm", "peaks")
]
PROGRAM = sorted(Path(__file__).parent.glob("linear_*.cpp"))
TESTS = ("vectors", "quantizing", "reference", "rows", "threads", "peaks")
TIMEOUT_S = 240.0
JOBS = 2

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@dataclass
class Builds:
    """Programs, each built once, from objects that are each compiled once."""

    folder: Path
    objects: dict[tuple[str, ...], Path] = field(default_factory=dict)
    programs: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def program(self, flags: Sequence[str], *, gemm_flags: Sequence[str] = (), compiler: str | None = None) -> Path:
        assert COMPILER is not None
        command = (compiler or COMPILER.path, *FLAGS, *flags)
        key = (*command, "--", *gemm_flags)
        if key not in self.programs:
            compiling = []
            for source in (*ENGINE, *PROGRAM):
                own = gemm_flags if source.name == "gemm.cpp" else ()
                if source in PROGRAM:
                    own = ("-O1",)  # compiles in half the time
                compiling.append((*command, *own, "-I", str(SOURCES), "-c", str(source)))
            with ThreadPoolExecutor(JOBS) as pool:
                objects = list(pool.map(self._object, compiling))
            target = self.folder / f"program-{len(self.programs)}"
            run([*command, *map(str, objects), "-o", str(target)])
            self.programs[key] = target
        return self.programs[key]

    def _object(self, command: tuple[str, ...]) -> Path:
        if command not in self.objects:
            target = self.folder / f"{abs(hash(command))}.o"
            run([*command, "-o", str(target)])
            self.objects[command] = target
        return self.objects[command]


def run(command: Sequence[str], *, fails: bool = False) -> str:
    """What it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S)
    assert (done.returncode != 0) == fails, f"{command[0]} ended with {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("linear"))


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("isa", ISAS)
def test_linear_layers_are_right_and_each_row_has_its_own_bits(builds: Builds, isa: str, test: str) -> None:
    assert f"{isa}: {test} passed" in run([str(builds.program(ISA_FLAGS[isa])), test])


def test_every_instruction_set_has_the_same_int8_codes_and_sums(builds: Builds) -> None:
    digests = {run([str(builds.program(ISA_FLAGS[isa])), "integers"]).splitlines()[0] for isa in ISAS}
    assert len(digests) == 1


def test_a_build_that_splits_k_by_the_number_of_rows_is_found_out(builds: Builds) -> None:
    program = builds.program(ISA_FLAGS[ISAS[0]], gemm_flags=["-DKVF_SPLIT_K_BY_ROWS"])
    run([str(program), "reference"])  # its values are right: only the order differs
    assert "differs in one call" in run([str(program), "rows"], fails=True)


def test_no_access_is_out_of_bounds_and_no_behaviour_undefined(builds: Builds) -> None:
    program = builds.program([*ISA_FLAGS[ISAS[0]], "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    for test in TESTS:
        run([str(program), test, "small"])
    assert "ERROR: AddressSanitizer" in run([str(program), "overrun"], fails=True)


def test_threads_have_no_data_race(builds: Builds) -> None:
    program = builds.program([*ISA_FLAGS[ISAS[0]], "-O1", "-fsanitize=thread"])
    for test in ("threads", "rows"):
        run([str(program), test, "small"])


def test_the_same_sources_work_on_64_bit_arm(builds: Builds) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs a cross compiler for 64-bit Arm and its emulator (g++-aarch64-linux-gnu, qemu-user)")
    program = builds.program(["-static"], compiler=compiler)
    for test in ("vectors", "quantizing", "reference", "rows"):
        assert f"portable: {test} passed" in run([emulator, str(program), test, "small"])
    here = run([str(builds.program(ISA_FLAGS["portable"])), "integers"])
    assert run([emulator, str(program), "integers"]) == here
