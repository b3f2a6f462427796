"""The package: an sdist, the wheel that is made of it, and what each extra gives outside the checkout.

Each extra is installed by pip, from the wheel, into an environment of its own; `dev` is where this runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

import pytest
from environment import Environment, this_torch
from packaging.requirements import Requirement
from stack import Stack

from kvferry.cache import cache_dir
from kvferry.engine.native.build import SOURCES, buildable_isas, find_compilers, packaged_name

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Imports a package with all that is below it, but for what can only be run.
IMPORT_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[2:]:
    root = importlib.import_module(package)
    assert sys.argv[1] in root.__path__[0], root.__path__
    for found in pkgutil.walk_packages(root.__path__, package + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
print("torch" in sys.modules)
"""
# What is tried of each extra: packages of ours that must be importable with it alone.
USES = {
    "gateway": ("kvferry_gateway", "kvferry.wire", "kvferry.bus", "kvferry.text"),
    "worker": ("kvferry_prefill", "kvferry_decode", "kvferry.worker", "kvferry.engine", "kvferry.transport"),
    "ucx": ("kvferry.transport",),
    "local": ("kvferry_local",),
    "otel": ("kvferry.trace",),
    "all": ("kvferry", "kvferry_gateway", "kvferry_prefill", "kvferry_decode", "kvferry_local"),
}
# Of those that bring nothing of ours to life: what of others' is theirs.
BRINGS = {"rivals": ("xgrammar",), "clients": ("langchain_openai", "litellm", "instructor")}
NUM_AT_ONCE = 2  # installations

Install = Callable[[str], Environment]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package")
    assert ROOT not in path.parents
    return path


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "warning" not in done.stderr.lower(), done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def sdist(folder: Path) -> Path:
    return build("sdist", ROOT, folder / "sdist")


@pytest.fixture(scope="session")
def wheel(folder: Path, sdist: Path) -> Path:
    """From what the sdist holds. Native libraries of the same sources, flags and compiler are not compiled again."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    (source / "build" / "native").mkdir(parents=True)
    for library in (cache_dir() / "native").glob("*.so"):
        shutil.copy2(library, source / "build" / "native")
    return build("wheel", source, folder / "wheel")


@pytest.fixture(scope="session")
def install(folder: Path, wheel: Path) -> Iterator[Install]:
    """The environment of an extra. They are made ahead, some at once, for most of it is waiting and unpacking."""
    torch = this_torch(folder)

    def make(extra: str) -> Environment:
        environment = Environment(folder / extra)
        environment.install(f"{wheel}[{extra}]", *torch)
        return environment

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        making = {extra: pool.submit(make, extra) for extra in (*USES, *BRINGS)}
        try:
            yield lambda extra: making[extra].result()
        finally:
            pool.shutdown(cancel_futures=True)
            for made in making.values():
                if not made.cancelled() and made.exception() is None:
                    made.result().remove()  # gigabytes, which pytest would keep


def metadata(wheel: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = HeaderParser().parsestr(archive.read(name).decode())
    return {key: message.get_all(key, []) for key in ("Provides-Extra", "Requires-Dist", "License-File")}


def test_the_sdist_holds_the_checkout_and_nothing_that_was_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "hatch_build.py", "LICENSE", "README.md", "services/decode/scaling.yaml"} <= names
    assert {f"shared/kvferry/engine/native/src/{path.name}" for path in SOURCES.iterdir()} <= names
    assert [name for name in names if name.endswith((".so", ".pyc")) or ".venv" in name] == []


def test_the_wheel_holds_packages_settings_pages_sources_and_libraries_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (*ROOT.glob("services/*/kvferry_*"), ROOT / "shared" / "kvferry"):
        files = [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        assert {str(file.relative_to(path.parent)) for file in files} <= names
    assert {f"kvferry_{role}/scaling.yaml" for role in ("gateway", "prefill", "decode")} <= names
    if find_compilers():
        assert {f"kvferry/engine/native/lib/{packaged_name(isa)}" for isa in buildable_isas()} <= names
        assert wheel.name.split("-")[2:4] == ["py3", "none"]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"kvferry", "kvferry_gateway", "kvferry_prefill", "kvferry_decode", "kvferry_local"}
    assert metadata(wheel)["License-File"] == ["LICENSE"]


@pytest.mark.parametrize("extra", USES)
def test_an_extra_has_all_that_its_programs_import(extra: str, install: Install, tmp_path: Path) -> None:
    alone = install(extra)
    alone.pip("check")
    imported = alone.run(IMPORT_ALL, str(alone.packages), *USES[extra], folder=tmp_path)
    assert imported.strip() == str(extra in ("worker", "all")), "only workers may import torch"
    if extra in ("ucx", "all"):
        assert "libucx" in alone.run("from kvferry.transport.libucp import _load; print(_load())")


@pytest.mark.parametrize("extra", BRINGS)
def test_an_extra_for_tests_and_benchmarks_brings_what_they_take(
    extra: str, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    alone = install(extra)
    alone.pip("check")
    alone.run(f"import kvferry.config.layers, {', '.join(BRINGS[extra])}", folder=tmp_path)


def test_every_extra_is_tried_here_or_is_where_this_runs(wheel: Path) -> None:
    told = metadata(wheel)
    assert {*USES, *BRINGS, "dev"} == set(told["Provides-Extra"])
    wanted = [Requirement(line) for line in told["Requires-Dist"] if "extra ==" in line]
    for each in wanted:
        if each.marker and each.marker.evaluate({"extra": "dev"}):
            assert version(each.name) in each.specifier, each


def test_the_stack_runs_from_the_wheel_and_streams_a_chat(
    install: Install, wheel: Path, model_dir: Path, tmp_path: Path
) -> None:
    clean = install("all")
    cache = tmp_path / "cache"
    flags = ("--model", str(model_dir), "--served-model-name", "smollm2", "--threads", "1")
    environ = {"KVFERRY_CACHE": str(cache), "PATH": f"{clean.scripts}:/usr/bin:/bin"}
    stack = Stack(tmp_path, *flags, environ=environ, program=str(clean.scripts / "kvferry"))
    try:
        stack.start()
        ours = [line for line in stack.processes().values() if "kvferry" in line]
        assert len(ours) >= 4
        assert [line for line in ours if str(ROOT) in line] == [], "something runs from the checkout"
        question = [{"role": "user", "content": "Name three rivers."}]
        body = {"model": "smollm2", "messages": question, "stream": True, "max_tokens": 24}
        with stack.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])
        if wheel.name.split("-")[-1] != "any.whl":
            assert {worker["engine"] for worker in stack.workers()} >= {"native"}
            assert not (cache / "native").exists(), "the library of the wheel was not taken"
        assert stack.stop() == 0
    finally:
        stack.close()
