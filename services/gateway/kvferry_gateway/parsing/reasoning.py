"""`<think>…</think>` before an answer, as DeepSeek R1, Qwen3 and their kin write it."""

from __future__ import annotations

from typing import Final

from kvferry_gateway.parsing.parser import OutputParser, Steps
from kvferry_gateway.parsing.parts import Content, Reasoning

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class ReasoningParser(OutputParser):
    """What follows the thoughts is read by another parser. Line breaks beside the tags are layout."""

    def __init__(self, answer: OutputParser | None, *, is_open: bool) -> None:
        """`answer`: None where it is plain text. `is_open`: the prompt ends within the thoughts."""
        super().__init__()
        self._answer = answer
        self._is_open = is_open
        self._breaks = ""  # held back: layout if the thoughts end here

    def _read(self) -> Steps[None]:
        if not self._is_open:
            yield from self._skip_space()
            self._is_open = yield from self._begins_with(OPEN)
            if self._is_open:
                self._take(len(OPEN))
            else:
                self._read_on("".join(self._consumed))
        if self._is_open:
            yield from self._skip_space("\n")
            if (yield from self._up_to(CLOSE, self._think)):
                yield from self._skip_space("\n")
        yield from self._rest(self._read_on)
        if self._answer is not None:
            self._parts += self._answer.finish()
            self.num_calls = self._answer.num_calls

    def _think(self, text: str) -> None:
        text = self._breaks + text
        thought = text.rstrip("\n")
        self._breaks = text[len(thought) :]
        if thought:
            self._parts.append(Reasoning(thought))

    def _read_on(self, text: str) -> None:
        if self._answer is not None:
            self._parts += self._answer.push(text)
        elif text:
            self._parts.append(Content(text))
