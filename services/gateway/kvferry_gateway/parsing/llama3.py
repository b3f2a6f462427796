"""Calls as Llama 3.1 to 3.3 write them: the whole answer is `{"name": …, "parameters": …}`, several joined by `;`."""

from __future__ import annotations

from typing import Final

from kvferry_gateway.parsing.parser import OutputParser, Steps

TAG: Final = "<|python_tag|>"  # may stand before a call


class Llama3Parser(OutputParser):
    """A JSON object is a call only if it bears the name of a tool: others are answers in JSON."""

    def _read(self) -> Steps[None]:
        yield from self._skip_space()
        if (yield from self._begins_with(TAG)):
            self._take(len(TAG))
        while True:
            yield from self._some_calls()
            if not (yield from self._up_to(TAG, self._show)):
                break
        self._show_space()

    def _some_calls(self) -> Steps[None]:
        yield from self._skip_space()
        while (yield from self._begins_with("{")):
            if not (yield from self._call()):
                return
            if not (yield from self._expect(";")):
                break
            yield from self._skip_space()
        if self.num_calls:
            self._consumed.clear()
        else:
            self._show_consumed()
