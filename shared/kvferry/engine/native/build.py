"""Compiles the library for one instruction set: at first use into the cache, or into a wheel when that is built.

A build is named by what it depends on: sources, flags and compiler. So an upgrade of any of them builds anew, and
what lies in the cache under a name is whole and right: it is moved there when it is finished.

Only the standard library is imported here, because the wheel's build hook (`hatch_build.py`) loads this file alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).with_name("src")
PACKAGED: Final = Path(__file__).with_name("lib")  # what the wheel carries
COMPILERS: Final = ("g++", "clang++", "c++")
COMPILER_SETTING: Final = "CXX"
# No -ffast-math and no contraction: the order and rounding of every operation is the source's.
FLAGS: Final = (
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden",
    "-Wall", "-Wextra",
)  # fmt: skip
_AVX512: Final = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
ISA_FLAGS: Final[Mapping[str, tuple[str, ...]]] = {
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DKVF_AMX"),  # compilers differ in what they define
    "avx512": _AVX512,
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
TIMEOUT_S: Final = 600.0  # of one compiler run
_MAX_MESSAGE_CHARS: Final = 300
_MAX_ATTEMPTS: Final = 3  # sources that change under every build are someone's open editor


class BuildError(Exception):
    """The library could not be built. The text is one line."""


class SourcesChanged(BuildError):
    """What was compiled is no longer what lies in the folder: its name would be wrong."""


@dataclass(frozen=True, slots=True)
class Compiler:
    path: str
    version: str  # first line of `--version`


def find_compilers() -> list[Compiler]:
    """C++ compilers that start: the one that CXX names, else those on PATH, in the order they are tried."""
    own = os.environ.get(COMPILER_SETTING)
    found = []
    for name in (own,) if own else COMPILERS:
        if (path := shutil.which(name)) is None:
            continue
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            output = subprocess.run([path, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
            found.append(Compiler(path, output.decode("utf-8", "replace").partition("\n")[0].strip()))
    return found


def buildable_isas() -> tuple[str, ...]:
    """Instruction sets that a compiler of this machine can be asked for."""
    return tuple(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)


def sources_digest(sources: Path = SOURCES) -> str:
    """Of the names and contents of all C++ files."""
    digest = hashlib.sha256()
    for path in sorted((*sources.glob("*.cpp"), *sources.glob("*.h"))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def packaged_name(isa: str, sources: Path = SOURCES) -> str:
    """File name in `PACKAGED`: a library that was built from other sources than lie here is not found."""
    return f"libkvferry-{isa}-{sources_digest(sources)[:16]}.so"


def build_cached(isa: str, cache: Path, building: Callable[[str], None] | None = None, sources: Path = SOURCES) -> Path:
    """The library for `isa`, built unless it lies in `cache`. Processes that want it at once wait for the first.

    `building` hears `isa` before that takes its seconds. Raises `BuildError` if there is no compiler, or none that
    can build it.
    """
    compilers = find_compilers()
    if not compilers:
        named = os.environ.get(COMPILER_SETTING)
        raise BuildError(f"{COMPILER_SETTING} names no compiler: {named}" if named else "there is no C++ compiler")
    problem = ""
    for compiler in compilers:
        try:
            return _built(isa, compiler, cache, building, sources)
        except BuildError as error:
            problem = problem or str(error)
        except OSError as error:
            raise BuildError(f"{cache}: {error.strerror or error}") from None
    raise BuildError(problem)


def build_for_wheel(folder: Path, warn: Callable[[str], object], sources: Path = SOURCES) -> list[Path]:
    """Libraries for all instruction sets that a compiler of this machine can build, by their names in the wheel.

    What an earlier call built in `folder` is used again: an image's layer can compile before the rest is copied in.
    """
    compilers = find_compilers()
    if not compilers:
        warn("there is no C++ compiler")
        return []
    packaged = []
    for isa in buildable_isas():
        try:
            built = _built(isa, compilers[0], folder, None, sources)
        except BuildError as error:
            warn(f"{isa}: {error}")
            continue
        target = folder / packaged_name(isa, sources)
        shutil.copy2(built, target)
        packaged.append(target)
    return packaged


def _built(isa: str, compiler: Compiler, folder: Path, building: Callable[[str], None] | None, sources: Path) -> Path:
    """The library by one compiler, in `folder`; anew if the sources change meanwhile. Raises `BuildError`, OSError."""
    for attempt in range(_MAX_ATTEMPTS):
        target = folder / f"libkvferry-{isa}-{_key(isa, compiler, sources)}.so"
        if target.is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        if building is not None and attempt == 0:
            building(isa)
        with _lock(target):
            for left in folder.glob(f"{_scratch_prefix(target)}*"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            if target.is_file():
                return target
            with contextlib.suppress(SourcesChanged):
                compile_library(isa, compiler, target, sources)
                return target
    raise SourcesChanged(f"{sources}: changed while it was compiled, {_MAX_ATTEMPTS} times")


def compile_library(isa: str, compiler: Compiler, target: Path, sources: Path = SOURCES) -> None:
    """Compile the sources side by side, link, and move the result to `target`.

    Raises `BuildError`, OSError; `SourcesChanged` if they are others by then, and `target` is not made.
    """
    digest = sources_digest(sources)
    flags = [*FLAGS, *ISA_FLAGS[isa]]
    # Beside the target, so that the move is atomic.
    with tempfile.TemporaryDirectory(prefix=_scratch_prefix(target), dir=target.parent) as scratch:
        objects = {file: str(Path(scratch) / f"{file.stem}.o") for file in sorted(sources.glob("*.cpp"))}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            commands = [[compiler.path, *flags, "-c", str(file), "-o", made] for file, made in objects.items()]
            list(pool.map(_run, commands))
        library = Path(scratch) / "library.so"
        _run([compiler.path, *flags, "-shared", *objects.values(), "-o", str(library)])
        if sources_digest(sources) != digest:
            raise SourcesChanged(f"{sources}: changed while it was compiled")
        library.chmod(0o755)
        library.replace(target)


def _scratch_prefix(target: Path) -> str:
    return f".{target.name}.build-"


def _key(isa: str, compiler: Compiler, sources: Path) -> str:
    parts = (sources_digest(sources), *FLAGS, *ISA_FLAGS[isa], compiler.path, compiler.version)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]}: {error}"[:_MAX_MESSAGE_CHARS]) from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "failed without a word")
        raise BuildError(f"{command[0]}: {first.strip()}"[:_MAX_MESSAGE_CHARS])


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One build of a library at a time, over all processes; the kernel lets go when its holder dies."""
    with target.with_name(f".{target.name}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
