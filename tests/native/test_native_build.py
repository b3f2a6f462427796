"""Building the library: cached by what it depends on, whole or not at all, and refused in one line."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry.engine.native import build
from kvferry.engine.native.build import BuildError, build_cached, find_compilers, packaged_name
from kvferry.engine.native.library import Library, LibraryUnavailable, open_library

COMPILER = next(iter(find_compilers()), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
BUILD = """
import sys
from pathlib import Path
from kvferry.engine.native.build import build_cached
print(build_cached("portable", Path(sys.argv[1]), sources=Path(sys.argv[2])))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "value.h").write_text("int value();\n")
    (folder / "value.cpp").write_text('#include "value.h"\nint value() { return 41; }\n')
    (folder / "answer.cpp").write_text(
        '#include "value.h"\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return value() + 1; }\n'
    )  # fmt: skip
    return folder


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line for every library that it links. Returns where."""
    assert COMPILER is not None
    log, program = tmp_path / "links", tmp_path / "cxx"
    log.touch()
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo link >> {log};; esac\nexec {COMPILER.path} "$@"\n', encoding="utf-8"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(program))
    return log


def answer(path: Path) -> int:
    value: int = ctypes.CDLL(str(path)).answer()
    return value


def test_a_build_is_made_once_and_again_when_a_source_changes(tmp_path: Path, sources: Path, counting: Path) -> None:
    announced: list[str] = []
    cache = tmp_path / "cache"
    first = build_cached("portable", cache, announced.append, sources)
    assert answer(first) == 42
    assert build_cached("portable", cache, announced.append, sources) == first
    assert counting.read_text().count("link") == len(announced) == 1
    (sources / "value.h").write_text("int value(); // changed\n")
    second = build_cached("portable", cache, announced.append, sources)
    assert second != first
    assert counting.read_text().count("link") == len(announced) == 2


def test_other_flags_or_another_compiler_are_another_build(
    tmp_path: Path, sources: Path, counting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    made = {build_cached("portable", cache, sources=sources)}
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    made.add(build_cached("portable", cache, sources=sources))
    monkeypatch.delenv("CXX")
    made.add(build_cached("portable", cache, sources=sources))
    assert len(made) == 3


@pytest.fixture
def editing(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a compiler that runs a line of shell on the sources after each file that it compiles."""

    def make(edit: str) -> Path:
        assert COMPILER is not None
        program = tmp_path / "editing"
        program.write_text(f'#!/bin/sh\n{COMPILER.path} "$@" || exit\ncd {sources} && {edit}\n', encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(program))
        return tmp_path / "cache"

    return make


def test_sources_that_change_while_they_are_compiled_are_compiled_again(
    sources: Path, editing: Callable[[str], Path]
) -> None:
    cache = editing("sed -i s/41/9/ value.cpp")
    assert answer(build_cached("portable", cache, sources=sources)) == 10
    assert len(list(cache.glob("*.so"))) == 1, "a library lies under the name of sources that it was not made of"


def test_sources_that_change_under_every_build_are_no_library(sources: Path, editing: Callable[[str], Path]) -> None:
    cache = editing("echo '//' >> value.h")
    with pytest.raises(BuildError, match="changed while it was compiled, 3 times"):
        build_cached("portable", cache, sources=sources)
    assert not list(cache.glob("*.so"))


def test_processes_that_build_at_once_get_one_library_and_compile_it_once(
    tmp_path: Path, sources: Path, counting: Path
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", BUILD, str(cache), str(sources)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(paths) == 1
    assert answer(Path(paths.pop())) == 42
    assert counting.read_text().count("link") == 1


def test_a_source_that_does_not_compile_is_one_line_and_leaves_nothing(tmp_path: Path, sources: Path) -> None:
    (sources / "value.cpp").write_text("int value() { return nothing; }\n")
    cache = tmp_path / "cache"
    with pytest.raises(BuildError) as error:
        build_cached("portable", cache, sources=sources)
    assert "value.cpp" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_what_a_killed_build_left_is_swept_by_the_next(tmp_path: Path, sources: Path) -> None:
    cache = tmp_path / "cache"
    path = build_cached("portable", cache, sources=sources)
    path.unlink()
    left = cache / f".{path.name}.build-x"
    left.mkdir()
    (left / "half.o").write_bytes(b"half")
    assert build_cached("portable", cache, sources=sources) == path
    assert not left.exists()


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_a_compiler_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=f"CXX names no compiler: {compiler}"):
        build_cached("portable", tmp_path)


def test_without_a_compiler_there_is_no_library_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path))
    with pytest.raises(LibraryUnavailable, match="there is no C\\+\\+ compiler"):
        open_library()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, sources: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildError, match="file"):
        build_cached("portable", tmp_path / "file" / "native", sources=sources)


def test_a_library_of_another_interface_or_none_is_refused(tmp_path: Path, sources: Path) -> None:
    with pytest.raises(LibraryUnavailable, match="kvf_"):
        Library(build_cached("portable", tmp_path / "cache", sources=sources))
    other = "".join(f'extern "C" EXPORT int {name}() {{ return 77; }}\n' for name in _functions())
    (sources / "answer.cpp").write_text(f'#define EXPORT __attribute__((visibility("default")))\n{other}')
    with pytest.raises(LibraryUnavailable, match="interface 77"):
        Library(build_cached("portable", tmp_path / "cache", sources=sources))
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(LibraryUnavailable, match=r"text\.so"):
        Library(tmp_path / "text.so")


def _functions() -> list[str]:
    from kvferry.engine.native.library import _SIGNATURES

    return list(_SIGNATURES)


def test_a_packaged_library_is_taken_before_any_compiler_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = open_library("portable")
    monkeypatch.setattr("kvferry.engine.native.library.PACKAGED", tmp_path)
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "empty"))
    with pytest.raises(LibraryUnavailable):
        open_library("portable")
    # A library that was built from other sources is not taken for this one.
    (tmp_path / "libkvferry-portable-0123456789abcdef.so").write_bytes(real.path.read_bytes())
    with pytest.raises(LibraryUnavailable):
        open_library("portable")
    (tmp_path / packaged_name("portable")).write_bytes(real.path.read_bytes())
    assert open_library("portable").path.parent == tmp_path


def test_the_wheel_hook_builds_every_instruction_set_of_this_kind_of_machine(tmp_path: Path, sources: Path) -> None:
    warnings: list[str] = []
    built = build.build_for_wheel(tmp_path / "wheel", warnings.append, sources)
    assert not warnings
    assert [path.name for path in built] == [packaged_name(isa, sources) for isa in build.buildable_isas()]
    assert os.access(built[0], os.X_OK)
    (sources / "value.cpp").write_text("broken")
    assert build.build_for_wheel(tmp_path / "wheel", warnings.append, sources) == []
    assert len(warnings) == len(built)


def test_the_wheel_hook_compiles_nothing_that_an_earlier_layer_has_compiled(
    tmp_path: Path, sources: Path, counting: Path
) -> None:
    first = build.build_for_wheel(tmp_path / "wheel", pytest.fail, sources)
    for path in first:
        path.unlink()  # what the wheel took; the build that it is a copy of stays
    assert build.build_for_wheel(tmp_path / "wheel", pytest.fail, sources) == first
    assert all(path.exists() for path in first)
    assert counting.read_text().count("link") == len(first)
