"""Calls as Mistral's models write them, behind `[TOOL_CALLS]`.

[TOOL_CALLS] [{"name": …, "arguments": …}, …]                   up to tokenizer version 7
[TOOL_CALLS]name{…}[TOOL_CALLS]name{…}                          from version 11 on
[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}, [TOOL_CALLS]name[ARGS]{…} the same with its marks
"""

from __future__ import annotations

import re
from typing import Final

from kvferry_gateway.parsing.parser import OutputParser, Steps

MARK: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
MAX_HEAD_CHARS: Final = 512  # between the mark and the arguments
_HEAD: Final = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*")


class MistralParser(OutputParser):
    def _read(self) -> Steps[None]:
        while (yield from self._up_to(MARK, self._show)):
            yield from self._skip_space()
            if self._text.startswith(("[", "{")):
                yield from self._calls()
            else:
                yield from self._named_call()
            self._consumed.clear()
        self._show_space()

    def _named_call(self) -> Steps[None]:
        while (brace := self._text.find("{", 0, MAX_HEAD_CHARS)) < 0:
            if self._ended or len(self._text) >= MAX_HEAD_CHARS:
                return self._show_consumed()
            yield
        head = _HEAD.fullmatch(self._text[:brace])
        if head is None or not self._may_call(head[1]):
            return self._show_consumed()
        self._take(brace)
        self._start(head[1])
        yield from self._arguments()
