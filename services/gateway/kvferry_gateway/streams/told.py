"""A stream whose events tell more than text: log-probabilities, token ids, thoughts, tool calls. Off the token path of
plain streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvferry.text.detokenizer import NOT_READY, TokenTexts
from kvferry.wire.logprobs import TokenLogprobs
from kvferry_gateway.answers.logprobs import ToldToken
from kvferry_gateway.parsing.parser import OutputParser
from kvferry_gateway.parsing.parts import Content, Part
from kvferry_gateway.streams.stream import PLAIN, TextRules, TokenStream


class ToldStream(TokenStream):
    """Each event has the tokens since the event before; tokens without text of their own wait for the next text.

    `told` keeps all of them for an answer that is not streamed.
    """

    __slots__ = ("_held_back", "_logprobs", "_make_event", "_num_chars", "_parser", "_waiting", "_wants_logprobs",
                 "told")  # fmt: skip

    def __init__(
        self,
        texts: TokenTexts,
        stops: Sequence[str],
        limit: int,
        rules: TextRules = PLAIN,
        frame: Callable[[str], tuple[bytes, bytes]] | None = None,
        *,
        wants_logprobs: bool,
        make_event: Callable[[Sequence[Part], Sequence[ToldToken]], bytes] | None = None,
        parser: OutputParser | None = None,
        num_chars: int = 0,
    ) -> None:
        """`make_event`: for streams; without it pieces are bare text. `parser`: of the text; None: it is content.
        `num_chars`: of text before the first token."""
        super().__init__(texts, stops, limit, rules, frame)
        self.ready_texts = NOT_READY
        self.told: list[ToldToken] = []
        self._held_back = False
        self._wants_logprobs = wants_logprobs
        self._make_event = make_event
        self._parser = parser
        self._num_chars = num_chars
        self._waiting: list[ToldToken] = []
        self._logprobs: dict[int, TokenLogprobs] = {}  # by index, of tokens that have not been taken

    @property
    def num_calls(self) -> int:
        """Tool calls that have begun."""
        return 0 if self._parser is None else self._parser.num_calls

    def hold_back(self) -> None:
        """Write nothing until `begin` tells what stands before it."""
        self._held_back = True

    def begin(self, first: bytes, now: float) -> None:
        self._held_back = False
        self.pieces.insert(0, first)
        self.flush(now)

    def due(self, now: float) -> bytes:
        return b"" if self._held_back else super().due(now)

    def close(self, last: bytes, now: float) -> None:
        if self._held_back:
            self.pieces.clear()  # what stands before them will never be told
        super().close(last, now)

    def note_logprobs(self, index: int, found: TokenLogprobs) -> None:
        if len(self.tokens) <= index < self.limit:
            self._logprobs[index] = found

    def append(self, token: int) -> None:
        if self.stopped:
            return
        found = self._logprobs.pop(len(self.tokens), None)
        if found is None and self._wants_logprobs:
            assert self.attempt is not None, "tokens come from an attempt"
            self.attempt.break_off()  # a worker that does not know what it was asked for
            return
        self.tokens.append(token)
        told = ToldToken(token, self._num_chars, found)
        self._waiting.append(told)
        self.told.append(told)
        text = self._text_of(token)
        self._num_chars += len(text)
        self._append_text(text)

    def finish(self) -> None:
        super().finish()
        if self._make_event is not None:
            self._tell([] if self._parser is None else self._parser.finish(), last=True)

    def _emit(self, text: str) -> None:
        if not text:
            return
        if self._make_event is None:
            super()._emit(text)
        else:
            self._tell([Content(text)] if self._parser is None else self._parser.push(text))

    def _tell(self, parts: Sequence[Part], last: bool = False) -> None:
        """An event for each part. The tokens go with the first one; without a part they wait, until the last."""
        if parts or (last and self._waiting):
            assert self._make_event is not None
            self.pieces.append(self._make_event(parts, self._waiting))
            self._waiting = []
