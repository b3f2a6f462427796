"""Where a JSON value ends, in a text that comes in pieces."""

from __future__ import annotations

import re
from typing import Final

_IN_STRING: Final = re.compile(r'["\\]')
_IN_BRACKETS: Final = re.compile(r'["{}\[\]]')
_BEHIND_SCALAR: Final = re.compile(r'[\s,:"{}\[\]]')


class JsonValue:
    """Scans one value, which begins with the first character pushed.

    It counts brackets and quotes and checks nothing else, so that a value that is not quite JSON still ends where
    its writer meant it to. Each character is looked at once.
    """

    def __init__(self) -> None:
        self._begun = False
        self._depth = 0  # of open brackets
        self._in_string = False
        self._escaped = False  # the next character belongs to a backslash

    def push(self, text: str) -> int | None:
        """Length of the part of `text` that ends the value; None: the value goes on behind it."""
        at = 0
        if not self._begun and text:
            self._begun = True
            self._in_string = text[0] == '"'
            self._depth = int(text[0] in "{[")
            at = int(self._in_string or self._depth)
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            if self._in_string:
                if (found := _IN_STRING.search(text, at)) is None:
                    return None
                self._escaped = found[0] == "\\"
                self._in_string = self._escaped
            elif self._depth:
                if (found := _IN_BRACKETS.search(text, at)) is None:
                    return None
                self._in_string = found[0] == '"'
                if not self._in_string:
                    self._depth += 1 if found[0] in "{[" else -1
            else:
                found = _BEHIND_SCALAR.search(text, at)
                return None if found is None else found.start()
            at = found.end()
            if not self._in_string and not self._depth:
                return at
        return None
