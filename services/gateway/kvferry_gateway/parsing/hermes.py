"""Calls as Hermes and Qwen write them: `<tool_call>{"name": …, "arguments": …}</tool_call>`, one pair of tags each."""

from __future__ import annotations

from typing import Final

from kvferry_gateway.parsing.parser import OutputParser, Steps

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


class HermesParser(OutputParser):
    """SmolLM2 writes a list of calls between the tags, which is taken, too."""

    def _read(self) -> Steps[None]:
        while (yield from self._up_to(OPEN, self._show)):
            yield from self._skip_space()
            if (yield from self._calls()):
                # Models close one bracket too many at times: between a call and its end nothing is content.
                yield from self._up_to(CLOSE, _drop)
        self._show_space()


def _drop(text: str) -> None:
    pass
