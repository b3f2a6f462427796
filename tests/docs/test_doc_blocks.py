"""Every shell block of the documents is run by a test, or says why not."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from pages import PAGES, Block, blocks, fault, parts, put, written
from terminal import Terminal, shown_pattern

PAGE = Path(__file__).parents[2] / "README.md"


def faults(found: list[Block]) -> list[str]:
    return [f"{block.place}: {wrong}" for block in found if (wrong := fault(block))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_block_of_commands_is_tested_or_says_why_not(page: Path) -> None:
    assert faults(blocks(page)) == []


@pytest.mark.parametrize(
    ("info", "wrong"),
    [
        ("sh", "needs one of"),
        ("bash", "needs one of"),
        ("sh test untested='it is and it is not'", "needs one of"),
        ("sh untested", "without a reason"),
        ("sh tested-by=tests/nothing.py", "does not exist"),
        ("sh tested-by=tests/docs/test_doc_blocks.py::test_nothing", "has no test_nothing"),
        ("sh tested-by=tests/docs/test_doc_blocks.py", "has no function without a name"),
        ("sh tested-by=tests/docs/test_doc_blocks.py::faults", 'has no written("README.md", "faults")'),
        ("sh tested-by=docs/tutorial.md", "runs no block with the same commands"),
        ("yaml untested", "without a reason"),
        ("", "names no language"),
    ],
)
def test_a_block_without_a_tag_or_with_an_unfounded_one_is_found(info: str, wrong: str) -> None:
    (found,) = faults(blocks(PAGE, f"```{info}\nmake nothing\n```\n"))
    assert wrong in found


def test_a_test_gets_the_commands_of_the_blocks_that_name_it_as_they_stand() -> None:
    (curl,) = written("README.md", "test_the_line_that_is_printed_works_when_it_is_pasted")
    assert curl.startswith("curl -N http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json'")
    assert "\\" not in curl
    up, models, down = written("docs/deployment.md", "compose")
    assert (up, down) == ("docker compose up --build --wait", "docker compose down")
    with pytest.raises(LookupError, match="no block that is tested by test_nothing"):
        written("README.md", "test_nothing")
    assert put(models, {"8000": 1234}) == "curl http://127.0.0.1:1234/v1/models"
    with pytest.raises(AssertionError, match="has no '9000'"):
        put(models, {"9000": 1234})
    assert parts("A=1 B='x y' kvferry up --flag C=3") == ({"A": "1", "B": "x y"}, ["kvferry", "up", "--flag", "C=3"])


@pytest.mark.parametrize("text", ["```sh tets\nmake\n```", "```sh test\nmake\n"])
def test_a_misspelt_tag_and_an_open_fence_are_found(text: str) -> None:
    with pytest.raises(ValueError, match=r"README\.md:1"):
        blocks(PAGE, text)


def test_a_block_inside_a_longer_fence_is_text() -> None:
    found = blocks(PAGE, "````text\n```sh\nmake\n```\n````\n```sh test\nls\n```")
    assert [(block.language, block.line) for block in found] == [("text", 1), ("sh", 6)]


@pytest.mark.parametrize(
    ("shown", "written", "matches"),
    [
        ("ready after 3.2 s", "ready  after 17 s\n", True),
        ("ready after 3.2 s", "ready before 3.2 s\n", False),
        ("NAME ROLE\ndecode-0 … ready", "NAME     ROLE\nprefill-0 x\ndecode-1  decode  ready  7\n", True),
        ("first\nsecond", "second\nfirst\n", False),
        ("a smollm2 of 135", "a smollm2 of 7, without an end", True),
        ("a smollm2 of 135", "a smollm3 of 135", False),
        ("first\n…\nsecond", "first\nother\nsecond\n", True),
    ],
)
def test_what_a_page_shows_is_compared_loosely_and_still_compared(shown: str, written: str, matches: bool) -> None:
    assert (shown_pattern(shown).search(written) is not None) is matches


def test_a_terminal_keeps_its_state_and_a_command_that_fails_fails_its_block(tmp_path: Path) -> None:
    with contextlib.closing(Terminal((), tmp_path, os.environ)) as terminal:
        terminal.run("cd / && here=$PWD")
        assert terminal.run("cat <<END\n$here\nEND") == "/\n"
        with pytest.raises(AssertionError, match="that was the last word"):
            terminal.run("echo that was the last word\nfalse\necho 'never written'")


def test_ctrl_c_ends_what_stays(tmp_path: Path) -> None:
    with contextlib.closing(Terminal((), tmp_path, os.environ)) as terminal:
        terminal.begin("trap 'echo drained; exit' INT; echo ready; while :; do sleep 0.1; done", shown_pattern("ready"))
        terminal.interrupt()
        assert terminal.output == "ready\ndrained\n"
