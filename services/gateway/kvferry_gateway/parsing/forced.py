"""Calls that the request demands. A grammar has made the text, so it is nothing but JSON."""

from __future__ import annotations

from kvferry_gateway.parsing.parser import OutputParser, Steps


class RequiredParser(OutputParser):
    """`tool_choice: "required"`: a list of calls."""

    def _read(self) -> Steps[None]:
        yield from self._skip_space()
        yield from self._calls()
        yield from self._rest(self._show)
        self._show_space()


class NamedParser(OutputParser):
    """A named tool: the text is its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _read(self) -> Steps[None]:
        self._start(self._name)
        yield from self._rest(self._argue)
