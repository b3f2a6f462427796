"""Prints what some of the project's extras require, one requirement a line, for `pip install --requirement`.

    python requirements.py pyproject.toml worker ucx --without torch

An image installs these in a layer of its own, before the sources are copied: a change of the code then rebuilds
seconds of work and not the layer that holds torch. Only the standard library, for nothing is installed yet.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path


def requirements_of(project: dict[str, object], extras: list[str], without: set[str]) -> list[str]:
    """The project's own requirements and those of its extras, less the packages named. Raises KeyError."""
    own, optional = project["dependencies"], project["optional-dependencies"]
    assert isinstance(own, list)
    assert isinstance(optional, dict)
    found = [*own, *(requirement for extra in extras for requirement in optional[extra])]
    return [requirement for requirement in dict.fromkeys(found) if package_of(requirement) not in without]


def package_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pyproject", type=Path)
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--without", action="append", default=[])
    options = parser.parse_args()
    project = tomllib.loads(options.pyproject.read_text())["project"]
    try:
        wanted = requirements_of(project, options.extras, set(options.without))
    except KeyError as missing:
        sys.exit(f"requirements.py: the project has no extra {missing}")
    print("\n".join(wanted))


if __name__ == "__main__":
    main()
