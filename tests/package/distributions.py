"""Installed distributions, what they require, and environments that hold some of them and nothing else."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Environment:
    """A virtual environment without pip, outside the checkout."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.scripts = folder / "bin"
        self.packages = next(folder.glob("lib/python*/site-packages"))

    def install(self, *requirements: str) -> None:
        """By pip, from wherever it is configured to take things."""
        self.pip("install", "--no-compile", "--quiet", *requirements)

    def pip(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--no-input", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def run(self, program: str, *arguments: str, folder: Path | None = None) -> str:
        """A Python program that sees this environment alone; its output."""
        command = [str(self.python), "-I", "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def lend(self, found: Iterable[Distribution]) -> None:
        """Link distributions that are installed elsewhere into this one: their files, not their neighbours'."""
        for distribution in found:
            source = Path(str(distribution.locate_file("")))
            for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                target = self.packages / name
                if not target.exists():
                    target.symlink_to(source / name)


def installed(packages: Path | None = None) -> dict[str, Distribution]:
    """By normalised name, of a site-packages folder; this interpreter's unless given."""
    found = distributions() if packages is None else distributions(path=[str(packages)])
    return {canonicalize_name(distribution.metadata["Name"]): distribution for distribution in found}


def required(name: str, extras: Sequence[str], among: dict[str, Distribution]) -> dict[str, Distribution]:
    """The distribution with its extras and all that they require, as pip would find them. KeyError: one is missing."""
    found: dict[str, Distribution] = {}
    waiting = [(canonicalize_name(name), frozenset(extras))]
    seen = set()
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        distribution = found[each[0]] = among[each[0]]
        for line in distribution.requires or ():
            requirement = Requirement(line)
            wanted = [{"extra": extra} for extra in (each[1] or ("",))]
            if requirement.marker is None or any(requirement.marker.evaluate(given) for given in wanted):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found
