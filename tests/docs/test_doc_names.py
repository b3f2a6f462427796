"""Links lead somewhere, and what the documents name exists: flags, variables, commands, make targets."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest
from pages import PAGES, ROOT, anchors, blocks, links, prose

from kvferry.config.environment import FILE_SUFFIX
from kvferry.config.environment import env_name as variable_of
from kvferry.config.settings import Settings
from kvferry_local.cli import main

# Other programs' flags that stand in prose; in blocks these programs' lines are not looked at.
FOREIGN_FLAGS = frozenset({
    "--build", "--wait", "--profile", "--scale", "--no-recreate", "--device", "--ulimit", "--cpunodebind", "--membind",
    "--cap-add", "--without-verbs", "--without-rdmacm", "--index-url",
})  # fmt: skip
# Read by what has no settings object; those of compose are found in its files.
OTHER_VARIABLES = frozenset({"KVFERRY_CACHE", "KVFERRY_READY_FD", "KVFERRY_TEST_MODEL"})
VARIABLE = re.compile(r"\bKVFERRY_[A-Z0-9_]*[A-Z0-9]")


def settings_classes() -> set[type[Settings]]:
    for module in ("kvferry_gateway", "kvferry_prefill", "kvferry_decode", "kvferry_local"):
        importlib.import_module(f"{module}.settings")
    found: set[type[Settings]] = set()
    more: list[type[Settings]] = [Settings]
    while more:
        cls = more.pop()
        found.add(cls)
        more += cls.__subclasses__()
    return found


def known_variables() -> set[str]:
    names = {variable_of(field) for cls in settings_classes() for field in cls.model_fields}
    files = (ROOT / "docker-compose.yml", *sorted((ROOT / "deploy/compose").glob("*.yml")))
    of_compose = {name for file in files for name in VARIABLE.findall(file.read_text())}
    return names | {name + FILE_SUFFIX for name in names} | of_compose | OTHER_VARIABLES


def known_flags() -> set[str]:
    flags = {"--" + field.replace("_", "-") for cls in settings_classes() for field in cls.model_fields}
    groups: list[click.Command] = [main]
    while groups:
        command = groups.pop()
        flags |= {option for parameter in command.params for option in parameter.opts}
        groups += command.commands.values() if isinstance(command, click.Group) else ()
    return flags | {"--help", "--config", "--join", "--version"}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue  # the outside is not asked
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text() if path else text)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    assert dead_links(page, page.read_text()) == []


def test_a_dead_link_is_found() -> None:
    text = "# One `two`, three\n[a](docs/nothing.md) [b](#one-two-three) [c](#four) [d](docs/api.md#nothing)\n"
    assert dead_links(ROOT / "README.md", text) == ["docs/nothing.md", "#four", "docs/api.md#nothing"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_variable_of_ours_that_is_named_is_read(page: Path) -> None:
    assert sorted(set(VARIABLE.findall(page.read_text())) - known_variables()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_flag_that_is_named_exists(page: Path) -> None:
    named = {flag for line in prose(page.read_text()) for code in re.findall(r"`([^`]+)`", line)
             for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)}  # fmt: skip
    lines = "\n".join(block.text for block in blocks(page)).replace("\\\n", " ").splitlines()
    ours = [line for line in lines if re.match(r"\s*(kvferry|\.venv/bin/kvferry) ", line)]
    named |= {flag for line in ours for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert sorted(named - known_flags() - FOREIGN_FLAGS) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_command_and_make_target_that_is_named_exists(page: Path) -> None:
    code = [code for line in prose(page.read_text()) for code in re.findall(r"`([^`]+)`", line)]
    code += [line for block in blocks(page) if block.is_shell for line in block.text.splitlines()]
    commands = {name for text in code for name in re.findall(r"(?:^|[\s/(])kvferry ([a-z]+)\b", text)}
    targets = {name for text in code for name in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", text)}
    assert sorted(commands - set(main.commands)) == []
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in sorted(targets) if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
