"""The documents say what the code is."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
from docs_tables import DOCUMENTS, ROOT, metrics_table, with_tables

import kvferry.wire
from kvferry.wire.codec import Message
from kvferry_gateway.metrics import GatewayMetrics

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
PACKAGES = ("kvferry", "kvferry_gateway", "kvferry_prefill", "kvferry_decode", "kvferry_local")


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def missing_names(text: str) -> list[str]:
    """Paths and modules of ours that the text names and the tree lacks."""
    return [name for name in sorted(quoted(text)) if not _exists(name)]


def _exists(name: str) -> bool:
    if re.fullmatch(r"kvferry(_[a-z]+)?(\.[a-z_]+)+", name):
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False
    if re.fullmatch(r"(\.ci|bench|deploy|docs|services|shared|tests)/[\w./-]*", name):
        return (ROOT / name).exists()
    return True  # no name of ours


@pytest.mark.parametrize("text", [README, ARCHITECTURE, PROTOCOL], ids=["README", "architecture", "protocol"])
def test_no_document_names_what_does_not_exist(text: str) -> None:
    assert missing_names(text) == []


def test_the_check_finds_a_name_that_does_not_exist() -> None:
    assert missing_names("`kvferry.wires.codec` `tests/nothing.py` `kvferry.wire.codec` `docs/architecture.md`") == [
        "kvferry.wires.codec",
        "tests/nothing.py",
    ]


def packages() -> list[str]:
    found = []
    for folder in (ROOT / "shared", *(ROOT / "services").iterdir()):
        for package in PACKAGES:
            for init in sorted((folder / package).rglob("__init__.py")):
                found.append(".".join(init.parent.relative_to(folder).parts))
    return found


def test_the_architecture_names_every_package() -> None:
    assert len(packages()) > len(PACKAGES)
    assert [package for package in packages() if package not in quoted(ARCHITECTURE)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_code(document: Path) -> None:
    text = document.read_text()
    assert "<!-- table " in text
    assert with_tables(text) == text, "run: python tests/docs_tables.py"


def test_a_changed_table_is_noticed() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    changed = text.replace("`KVFERRY_PORT`", "`KVFERRY_PROT`")
    assert changed != text
    assert with_tables(changed) == text


def test_the_table_of_metrics_has_the_labels_that_samples_have() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| gateway \|", metrics_table(), re.MULTILINE)
    labels = {name: quoted(cell) for name, cell in rows}
    shown = {
        sample.name.removesuffix("_bucket"): sample.labels.keys() - {"le"}
        for family in GatewayMetrics(["m"]).registry.collect()
        for sample in family.samples
    }
    both = labels.keys() & shown.keys()
    assert {name: shown[name] for name in both} == {name: labels[name] for name in both}
    assert shown["kvferry_itl_seconds"] == {"model"}


@pytest.mark.parametrize("target", ["run", "setup", "check", "test", "bench"])
def test_the_readme_explains_every_make_target(target: str) -> None:
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_no_document_names_a_private_path() -> None:
    for path in (ROOT / "README.md", *Path(ROOT / "docs").glob("*.md"), ROOT / "CHANGELOG.md"):
        assert not re.search(r"/(root|work|home)/", path.read_text()), path


def wire_messages() -> set[str]:
    """Every tagged message type of both planes."""
    found = set()
    modules = [
        importlib.import_module(f"kvferry.wire.{module.name}") for module in pkgutil.iter_modules(kvferry.wire.__path__)
    ]
    for module in modules:
        for name, kind in vars(module).items():
            if (
                isinstance(kind, type)
                and issubclass(kind, Message)
                and kind.__struct_config__.tag
                and kind.__name__ == name
            ):
                found.add(name)
    return found


def test_the_protocol_lists_every_message_and_no_other() -> None:
    rows = re.findall(r"^\| `([A-Z]\w+)` \| [^|]+\| [^|]+\| [^|]+\| [^|]+\|$", PROTOCOL, re.MULTILINE)
    assert set(rows) == wire_messages()
    assert len(rows) == len(set(rows))
