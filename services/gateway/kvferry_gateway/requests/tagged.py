"""Grammars of free text with parts in it that must follow a schema: structural tags, and calls of a model's own accord.

    text ──trigger──> what must follow it ──> text ──trigger──> … ──> end

Until a trigger has come, any text may. The source is JSON: a grammar in llguidance's Lark, and the schemas that it
names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvferry.wire.sampling import Grammar

Special = Mapping[str, int]  # special tokens by their text: to a grammar they are no text

_TERMINALS: Final = (r"ANY: /(.|\n)*/", r"SPACE: /[ \t\r\n]{0,8}/")


class TaggedText:
    """One grammar in the making."""

    def __init__(self, special: Special) -> None:
        self._special = special
        self._marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._rules: list[str] = []
        self._schemas: dict[str, Any] = {}

    def literal(self, text: str) -> str:
        """Just this text, in which special tokens may stand."""
        parts, end = [], 0
        for found in self._marks.finditer(text):
            parts += [text[end : found.start()], f"<[{self._special[found[0]]}]>"]
            end = found.end()
        parts.append(text[end:])
        spelled = [part if place % 2 else json.dumps(part) for place, part in enumerate(parts) if part]
        return " ".join(spelled)

    def schema(self, schema: Any) -> str:
        """JSON of this schema."""
        name = f"schema_{len(self._schemas)}"
        self._schemas[name] = schema
        return f"@{name}"

    def rule(self, name: str, body: str, *, lazy: bool = False) -> str:
        """`lazy`: it ends where it first can."""
        self._rules.append(f"{name}[lazy]: {body}" if lazy else f"{name}: {body}")
        return name

    def up_to(self, mark: str, text: str = r"(.|\n)*") -> str:
        """A rule of text of this form (a regular expression that takes none, too) up to the first `mark`, which is
        consumed. To a special token any text of the form leads, to another mark the shortest."""
        name = f"up_to_{len(self._rules)}"
        return self.rule(name, f"/{text}/ {self.literal(mark)}", lazy=mark not in self._special)

    def shown(self, marks: Iterable[str]) -> str:
        """Text up to one of these marks, as far as they are special tokens; never comes if none is."""
        known = [self.literal(mark) for mark in marks if mark in self._special]
        return self.rule(f"shown_{len(self._rules)}", f"ANY ({' | '.join(known)})") if known else ""

    def grammar(self, start: str) -> Grammar:
        lark = "\n".join((f"start: {start}", *_TERMINALS, *self._rules))
        source = {"lark": lark, "schemas": self._schemas}
        return Grammar("tagged", json.dumps(source, ensure_ascii=False, separators=(",", ":")))


def between(tag: str, shown: str = "", *, at_least_one: bool = False, at_most_one: bool = False) -> str:
    """The start of a grammar: `tag`s, each with the text before it, and text behind them."""
    before = f"{shown}* " if shown else ""
    piece = f"({tag} | {shown})" if shown else tag
    if at_most_one:
        return f"{before}{tag} SPACE" if at_least_one else f"{before}({tag} SPACE | ANY)"
    return f"{before}{tag} {piece}* ANY" if at_least_one else f"{piece}* ANY"
