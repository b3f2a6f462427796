"""The commands of the documents, typed as they stand: first the tutorial, then what other pages do with its cluster.

The reader's two machines are two network namespaces with a cable between them; they share the checkout.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from pages import ROOT, Block, blocks
from stack import MARK, eventually, marked_processes
from terminal import Machine, Terminal, shown_pattern, two_machines

FIRST: Final = "docs/tutorial.md"  # it starts what the other pages look at


def pages_to_type() -> list[str]:
    pages = [FIRST, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    return [page for page in dict.fromkeys(pages) if any("test" in block.tags for block in blocks(ROOT / page))]


def outputs(page: Path) -> Iterator[tuple[Block, str | None]]:
    """Its blocks that are run, each with the output that is shown below it."""
    found = [block for block in blocks(page) if block.is_shell or "output" in block.tags]
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.is_shell and "test" in block.tags:
            yield block, following.text if following and "output" in following.tags else None


def type_page(page: Path, machines: dict[str, Machine]) -> None:
    """Raises AssertionError with the place of the block that failed."""
    first = next(iter(machines))
    for block, shown in outputs(page):
        machine = machines[block.tags.get("on", first)]
        terminal = machine.terminal(block.tags.get("terminal", "main"))
        try:
            if stopped := block.tags.get("ctrl-c"):
                machine.stop(stopped)
            type_block(terminal, block, shown)
        except AssertionError as error:
            raise AssertionError(f"{block.place}: {error}") from None


def type_block(terminal: Terminal, block: Block, shown: str | None) -> None:
    if "stays" in block.tags:
        assert shown is not None, "a program that stays has to show when it is ready"
        terminal.begin(block.text, shown_pattern(shown))
        return
    written = terminal.run(block.text)
    if shown is not None:
        assert shown_pattern(shown).search(written), f"the page shows\n{shown}\nand the commands wrote\n{written}"


@pytest.fixture
def environ(model_dir: Path, tmp_path: Path) -> dict[str, str]:
    """A new user's, but for what is installed and fetched already: the namespaces have no way out."""
    if subprocess.run(["make", "--question", ".venv/.run"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("what is installed in .venv is not current: run `make setup`")
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "TMPDIR") if key in os.environ}
    cache = model_dir.parents[2]  # of `kvferry model fetch`
    return {**kept, "HOME": str(tmp_path), "KVFERRY_CACHE": str(cache), MARK: os.urandom(16).hex()}


@pytest.mark.timeout(1200)
def test_the_documents_commands_do_what_the_documents_say(environ: dict[str, str]) -> None:
    with two_machines(ROOT, environ) as machines:
        for page in pages_to_type():
            type_page(ROOT / page, machines)
        for machine in machines.values():
            for terminal in machine.terminals.values():
                terminal.end()
        eventually(lambda: not marked_processes(environ[MARK]))
