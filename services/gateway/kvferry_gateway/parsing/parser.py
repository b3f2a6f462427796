"""The base of all parsers: a grammar written as generators, which wait at `yield` for more text.

No parser ever hides text: what begins like a call and turns out to be none is content. Whether the text comes
character by character or at once, the parts are the same, but for the pieces that their texts are cut into.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator
from typing import Final, TypeVar

from kvferry_gateway.parsing.json_value import JsonValue
from kvferry_gateway.parsing.parts import CallArguments, CallStart, Content, Part

T = TypeVar("T")
Steps = Generator[None, None, T]

_NAME: Final = re.compile(r"[^\s\x00-\x1f\ud800-\udfff]{1,256}")
_ARGUMENTS: Final = ("arguments", "parameters")


class OutputParser(ABC):
    """One choice's. `push` its text, then `finish`."""

    def __init__(self, names: Collection[str] | None = None, max_calls: int | None = None) -> None:
        """`names`: those that a call may have, if not any. `max_calls`: calls beyond are left out."""
        self.num_calls = 0
        self._names = names
        self._max_calls = max_calls
        self._text = ""  # not consumed yet
        self._ended = False
        self._consumed: list[str] = []  # of what may turn out to be content
        self._space = ""  # held back: shown only between texts, not beside a call
        self._behind_call = False
        self._parts: list[Part] = []
        self._steps = self._read()

    def push(self, text: str) -> list[Part]:
        """The parts that `text` completes."""
        self._text += text
        return self._advance()

    def finish(self) -> list[Part]:
        """The parts that were held back, when the text has ended."""
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Part]:
        next(self._steps, None)
        parts, self._parts = self._parts, []
        return parts

    @abstractmethod
    def _read(self) -> Steps[None]:
        """The grammar. Returns only when the text has ended and all of it is consumed."""

    # -- text ------------------------------------------------------------------------------------------------

    def _take(self, num_chars: int) -> str:
        taken, self._text = self._text[:num_chars], self._text[num_chars:]
        self._consumed.append(taken)
        return taken

    def _skip_space(self, chars: str | None = None) -> Steps[None]:
        """`chars`: what counts as space, if not all of it."""
        while True:
            self._take(len(self._text) - len(self._text.lstrip(chars)))
            if self._text or self._ended:
                return
            yield

    def _rest(self, show: Callable[[str], None]) -> Steps[None]:
        """Give all that comes to `show`, until the text has ended."""
        while True:
            show(self._take(len(self._text)))
            self._consumed.clear()
            if self._ended:
                return
            yield

    def _begins_with(self, literal: str) -> Steps[bool]:
        """Whether `literal` comes next."""
        while not self._text.startswith(literal):
            if self._ended or not literal.startswith(self._text):
                return False
            yield
        return True

    def _expect(self, literal: str) -> Steps[bool]:
        """Consume `literal` and the space before it, if it comes next."""
        yield from self._skip_space()
        found = yield from self._begins_with(literal)
        if found:
            self._take(len(literal))
        return found

    def _up_to(self, marker: str, show: Callable[[str], None]) -> Steps[bool]:
        """Give the text before `marker` to `show` and consume both. False: it has ended without one."""
        while True:
            found = self._text.find(marker)
            if found >= 0:
                show(self._take(found))
                self._consumed.clear()
                self._take(len(marker))
                return True
            show(self._take(len(self._text) - (0 if self._ended else _overlap(self._text, marker))))
            self._consumed.clear()
            if self._ended:
                return False
            yield

    def _show(self, text: str) -> None:
        """Content. Space at its end waits, since beside a call it is layout."""
        text = self._space + text
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._parts.append(Content(shown))

    def _show_space(self) -> None:
        """The text has ended: without calls, it is content to its last character."""
        if self._space and not self.num_calls:
            self._parts.append(Content(self._space))
        self._space = ""

    def _show_consumed(self) -> None:
        """What was consumed is content after all."""
        self._show("".join(self._consumed))
        self._consumed.clear()

    # -- JSON ------------------------------------------------------------------------------------------------

    def _value(self, take: Callable[[str], None]) -> Steps[bool]:
        """One JSON value, handed on as it comes. False: the text has ended within it."""
        scan = JsonValue()
        while True:
            end = scan.push(self._text)
            take(self._take(len(self._text) if end is None else end))
            if end is not None or self._ended:
                return end is not None
            yield

    def _whole_value(self) -> Steps[str | None]:
        pieces: list[str] = []
        complete = yield from self._value(pieces.append)
        return "".join(pieces) if complete else None

    def _string(self) -> Steps[str | None]:
        """A JSON string, decoded. None: something else comes next."""
        yield from self._skip_space()
        if not (yield from self._begins_with('"')):
            return None
        raw = yield from self._whole_value()
        return None if raw is None else _decoded(raw)

    # -- calls -----------------------------------------------------------------------------------------------

    def _calls(self) -> Steps[bool]:
        """One call or a list of them. False: none has begun, and what was consumed is shown as content."""
        if not (yield from self._begins_with("[")):
            return (yield from self._call())
        self._take(1)
        begun = False
        while (yield from self._call()):
            begun = True
            self._consumed.clear()
            if not (yield from self._expect(",")):
                yield from self._expect("]")
                break
        return begun

    def _call(self) -> Steps[bool]:
        """`{"name": …, "arguments": …}`, in any order; other keys are passed over. Returns as `_calls`."""
        calls_before = self.num_calls
        name: str | None = None
        early: str | None = None  # arguments that stood before the name
        opened = yield from self._expect("{")
        closed = opened and (yield from self._expect("}"))
        while opened and not closed:
            key = yield from self._string()
            if key is None or not (yield from self._expect(":")):
                break
            yield from self._skip_space()
            if key == "name" and name is None:
                name = yield from self._string()
                if name is None or not self._may_call(name):
                    break
                if early is not None:
                    self._start(name)
                    self._argue(_as_arguments(early))
            elif key in _ARGUMENTS and name is None:
                if (early := (yield from self._whole_value())) is None:
                    break
            elif key in _ARGUMENTS and self.num_calls == calls_before and name is not None:
                self._start(name)
                if not (yield from self._arguments()):
                    break
            elif (yield from self._whole_value()) is None:
                break
            closed = yield from self._expect("}")
            if not closed and not (yield from self._expect(",")):
                break
        if closed and name is not None and self.num_calls == calls_before:
            self._start(name)
            self._argue("{}")
        begun = self.num_calls > calls_before
        if not begun:
            self._show_consumed()
        return begun

    def _may_call(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None and (self._names is None or name in self._names)

    def _start(self, name: str) -> None:
        self._space = ""
        self._behind_call = True
        self._consumed.clear()
        if self._max_calls is None or self.num_calls < self._max_calls:
            self._parts.append(CallStart(self.num_calls, name))
        self.num_calls += 1

    def _argue(self, text: str) -> None:
        index = self.num_calls - 1
        if text and (self._max_calls is None or index < self._max_calls):
            self._parts.append(CallArguments(index, text))

    def _arguments(self) -> Steps[bool]:
        """Of the call that has started. An object is told as it comes; some models write it into a string."""
        yield from self._skip_space()
        if (yield from self._begins_with("{")):
            return (yield from self._value(self._argue))
        raw = yield from self._whole_value()
        self._argue("" if raw is None else _as_arguments(raw))
        return raw is not None


def _as_arguments(raw: str) -> str:
    if raw == "null":
        return "{}"
    decoded = _decoded(raw)
    return raw if decoded is None else decoded.encode("utf-8", "replace").decode()


def _decoded(raw: str) -> str | None:
    """The text of a JSON string; None if `raw` is none."""
    try:
        value = json.loads(raw, strict=False) if raw.startswith('"') else None
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` may begin with."""
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)
