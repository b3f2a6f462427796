"""Environments that hold nothing but what pip put there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.request
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Final

# As in the Makefile: torch for CPUs, where this answers, else what pip is configured to use.
CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
CPU_INDEX_TIMEOUT_S: Final = 3


class Environment:
    """A virtual environment without pip, outside the checkout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.scripts = folder / "bin"
        self.packages = next(folder.glob("lib/python*/site-packages"))

    def install(self, *arguments: str) -> None:
        """By pip, from wherever it is configured to take things, and with its cache."""
        self.pip("install", "--no-compile", "--quiet", *arguments)

    def remove(self) -> None:
        shutil.rmtree(self._folder)

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


def this_torch(folder: Path) -> list[str]:
    """Arguments for pip to take torch, where it is required, in the version that this interpreter has."""
    constraint = folder / "torch.txt"
    constraint.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    arguments = ["--constraint", str(constraint)]
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=CPU_INDEX_TIMEOUT_S):
            return [*arguments, "--extra-index-url", CPU_INDEX]
    except OSError:
        return arguments
