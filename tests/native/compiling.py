"""C++ for tests, compiled once in a session: what two tests need alike is made for both.

So that they do need it alike, the kinds of builds have names: `product` is what the library is shipped as, `SANITIZED`
and `RACES` are instrumented, for the best instruction set of this machine and with little optimisation, which compiles
in half the time. So are the tests' own sources in every kind.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from kvferry.cache import cache_dir
from kvferry.engine.native.build import FLAGS, ISA_FLAGS, SOURCES, build_cached, buildable_isas, find_compilers
from kvferry.engine.native.cpu import cpu_flags, usable_isas

COMPILER = next(iter(find_compilers()), None)
ISAS = [isa for isa in usable_isas(cpu_flags()) if isa in buildable_isas()]
HERE = Path(__file__).parent
LIBRARY = tuple(sorted(SOURCES.glob("*.cpp")))
TIMEOUT_S = 240.0
_BEST = ISA_FLAGS[ISAS[0]]
SANITIZED = (*_BEST, "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = (*_BEST, "-O1", "-fsanitize=thread")
SPLIT_K = {"gemm.cpp": ("-DKVF_SPLIT_K_BY_ROWS",)}  # the negative control of exactness
TEST_FLAGS = ("-O1",)


def product(isa: str) -> tuple[str, ...]:
    return ISA_FLAGS[isa]


def engine(*names: str) -> tuple[Path, ...]:
    """Sources of the library by their names."""
    return tuple(SOURCES / f"{name}.cpp" for name in names)


def run(command: Sequence[str | Path], *, fails: bool = False) -> str:
    """Run a program that must succeed, or fail. Returns what it prints, both streams."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, f"{command[0]} ended with {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


@dataclass
class Compiled:
    """Objects and what was linked from them, in a folder of the session's; named by the digest of how they are made."""

    folder: Path
    _made: dict[str, Future[Path]] = field(default_factory=dict)
    _digests: dict[Path, bytes] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count() or 1))

    def program(
        self,
        flags: Sequence[str],
        sources: Iterable[Path],
        *,
        own: Mapping[str, Sequence[str]] | None = None,
        compiler: str = "",
    ) -> Path:
        """An executable. `own`: more flags of a source, by its name."""
        return self._linked((), flags, sources, own or {}, compiler)

    def library(
        self,
        flags: Sequence[str],
        sources: Iterable[Path] = LIBRARY,
        *,
        own: Mapping[str, Sequence[str]] | None = None,
        compiler: str = "",
    ) -> Path:
        """A shared library, as `compile_library` makes it."""
        return self._linked(("-shared",), flags, sources, own or {}, compiler)

    def product(self, isa: str) -> Path:
        """The library as it is shipped. The best one's objects serve other tests, too; the others are the cache's."""
        return self.library(product(isa)) if isa == ISAS[0] else build_cached(isa, cache_dir() / "native")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _linked(
        self,
        kind: tuple[str, ...],
        flags: Sequence[str],
        sources: Iterable[Path],
        own: Mapping[str, Sequence[str]],
        compiler: str,
    ) -> Path:
        assert COMPILER is not None
        command = (compiler or COMPILER.path, *FLAGS, *flags)
        objects = [
            self._object(source, (*command, *(TEST_FLAGS if source.parent == HERE else ()), *own.get(source.name, ())))
            for source in sources
        ]
        made = [str(each.result()) for each in objects]
        return self._make((*command, *kind, *made), b"", ".so" if kind else "").result()

    def _object(self, source: Path, command: tuple[str, ...]) -> Future[Path]:
        return self._make((*command, "-I", str(SOURCES), "-c", str(source)), self._digest(source), ".o")

    def _make(self, command: tuple[str, ...], content: bytes, suffix: str) -> Future[Path]:
        """What the command makes, in a file that is named by the command and by the content that it reads."""
        key = hashlib.sha256("\0".join(command).encode() + b"\0" + content).hexdigest()[:24]
        with self._lock:
            if key not in self._made:
                target = self.folder / f"{key}{suffix}"
                self._made[key] = self._pool.submit(_compile, (*command, "-o", str(target)), target)
            return self._made[key]

    def _digest(self, source: Path) -> bytes:
        """Of a source and of every header that it may include."""
        if source not in self._digests:
            files = {source, *source.parent.glob("*.h"), *SOURCES.glob("*.h")}
            whole = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(files))
            self._digests[source] = hashlib.sha256(whole).digest()
        return self._digests[source]


def _compile(command: tuple[str, ...], target: Path) -> Path:
    run(command)
    return target
