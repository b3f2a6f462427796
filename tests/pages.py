"""The documents as Markdown: their headings, links and fenced blocks, and what a block's info string says of it.

Every shell block is tagged, behind its language, with exactly one of

    test                    it is run, in the order of its page (`test_tutorial.py`)
    tested-by=WHERE         a test that takes these commands out of the page with `written` (FILE::NAME), or a page
                            with the same block
    untested="REASON"       it is not run, and why

A block that is run may also say

    on=MACHINE              on which machine; the page's first one unless given
    terminal=NAME           in which of its terminals, each of which is one shell; `main` unless given
    stays                   its last command goes on, once it has written what the page shows
    ctrl-c=NAME             before it, that terminal's program is stopped with Ctrl-C

and a block of the language `text` with the tag `output`, right below it, shows what it writes. Blocks of other
languages may have a verdict, too. So that what is typed can be told from what is shown, every fence names a language.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHELLS: Final = frozenset({"sh", "bash", "shell", "console", "zsh"})
VERDICTS: Final = ("test", "tested-by", "untested")
OPTIONS: Final = frozenset({*VERDICTS, "on", "terminal", "stays", "ctrl-c", "output"})

_ASSIGNMENT: Final = re.compile(r"\w+=")
_FENCE: Final = re.compile(r"^(`{3,}|~{3,})(.*)$")
_HEADING: Final = re.compile(r"^#{1,6} (.+?)\s*$")
_LINK: Final = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: Path
    line: int  # of the opening fence, from 1
    language: str
    tags: dict[str, str]  # "" where a tag has no value
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in SHELLS

    @property
    def commands(self) -> str:
        """Without comments and line ends, to compare blocks by."""
        return re.sub(r"\s+#.*$", "", self.text, flags=re.MULTILINE).strip()


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """In their order. Raises ValueError for an info string that cannot be read, or a fence that stays open."""
    found: list[Block] = []
    fence, begin, info, inside = "", 0, "", [""]
    for number, line in enumerate((page.read_text() if text is None else text).splitlines(), 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence, begin, info, inside = match[1], number, match[2], []
        elif fence and match and match[1].startswith(fence) and not match[2].strip():
            language, _, tags = info.strip().partition(" ")
            found.append(Block(page, begin, language, _tags(tags, f"{page.name}:{begin}"), "\n".join(inside)))
            fence = ""
        elif fence:
            inside.append(line)
    if fence:
        raise ValueError(f"{page.name}:{begin}: a fence that is not closed")
    return found


def _tags(text: str, place: str) -> dict[str, str]:
    found = {}
    for word in shlex.split(text):
        name, _, value = word.partition("=")
        if name not in OPTIONS:
            raise ValueError(f"{place}: unknown tag {name!r}")
        found[name] = value
    return found


def written(page: str, name: str) -> list[str]:
    """The commands of the blocks of a page that say to be tested by NAME, one entry each, as they stand.

    What is to run elsewhere than the page says is told to `put`. A test that unpacks the list fails once the page has
    another number of commands. Raises LookupError where no block names it.
    """
    found = [block for block in blocks(ROOT / page) if _tester(block)[1] == name]
    if not found:
        raise LookupError(f"{page} has no block that is tested by {name}")
    lines = "\n".join(block.commands for block in found if block.is_shell).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()] + [block.text for block in found if not block.is_shell]


def put(command: str, instead: Mapping[str, object]) -> str:
    """The command with some of its words replaced, each of which it must have."""
    for word, other in instead.items():
        assert word in command, f"{command!r} has no {word!r}"
        command = command.replace(word, str(other))
    return command


def parts(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a command is given, and its words, for a test that starts the program by itself."""
    words = shlex.split(command)
    given = 0
    while _ASSIGNMENT.match(words[given]):
        given += 1
    pairs = (word.partition("=") for word in words[:given])
    return {name: value for name, _, value in pairs}, words[given:]


def fault(block: Block) -> str | None:
    """What is wrong with the tags of a block."""
    if not block.language:
        return "names no language"
    given = [name for name in VERDICTS if name in block.tags]
    if len(given) != 1 and (block.is_shell or given):
        return f"needs one of {', '.join(VERDICTS)}, has {', '.join(given) or 'none'}"
    if given == ["untested"] and len(block.tags["untested"].split()) < 2:
        return "untested without a reason"
    if given == ["tested-by"]:
        return _unfounded(block)
    return None


def _tester(block: Block) -> tuple[str, str]:
    """FILE and NAME of `tested-by`."""
    where, _, name = block.tags.get("tested-by", "").partition("::")
    return where, name


def _unfounded(block: Block) -> str | None:
    """Why `tested-by` is not true of a block."""
    where, name = _tester(block)
    path = ROOT / where
    if not path.is_file():
        return f"{where} does not exist"
    if path.suffix == ".md":
        same = [other for other in blocks(path) if other.commands == block.commands and "test" in other.tags]
        return None if same else f"{where} runs no block with the same commands"
    tree = ast.parse(path.read_text())
    if not any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name for node in tree.body):
        return f"{where} has no {name or 'function without a name: FILE::NAME'}"
    if (str(block.page.relative_to(ROOT)), name) not in _taken(tree):
        return f'{where} does not run it: it has no written("{block.page.relative_to(ROOT)}", "{name}")'
    return None


def _taken(tree: ast.AST) -> set[tuple[object, ...]]:
    """Pages and names with which a test's file calls `written`. Only literals count."""
    return {
        tuple(argument.value for argument in node.args if isinstance(argument, ast.Constant))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "written"
    }


def prose(text: str) -> Iterator[str]:
    """The lines outside fenced blocks."""
    fence = ""
    for line in text.splitlines():
        match = _FENCE.match(line)
        if match and (not fence or (match[1].startswith(fence) and not match[2].strip())):
            fence = "" if fence else match[1]
        elif not fence:
            yield line


def anchors(text: str) -> set[str]:
    """What a link may name behind its #, as GitHub makes it from headings."""
    found: set[str] = set()
    for line in prose(text):
        if match := _HEADING.match(line):
            words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            count = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
            found.add(f"{slug}-{count}" if count else slug)
    return found


def links(text: str) -> list[str]:
    return [match[1] or match[2] for line in prose(text) for match in _LINK.finditer(line)]
