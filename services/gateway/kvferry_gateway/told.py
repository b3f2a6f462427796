"""A stream whose events tell more than text: log-probabilities and token ids. Off the token path of plain streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from kvferry.text.detokenizer import TokenTexts
from kvferry.wire.logprobs import TokenLogprobs
from kvferry_gateway.logprobs import ToldToken
from kvferry_gateway.streams import PLAIN, TextRules, TokenStream


class ToldStream(TokenStream):
    """Each event has the tokens since the event before; tokens without text of their own wait for the next text.

    `told` keeps all of them for an answer that is not streamed.
    """

    __slots__ = ("_logprobs", "_make_event", "_num_chars", "_waiting", "_wants_logprobs", "told")

    def __init__(
        self,
        texts: TokenTexts,
        stops: Sequence[str],
        limit: int,
        rules: TextRules = PLAIN,
        frame: Callable[[str], tuple[bytes, bytes]] | None = None,
        *,
        wants_logprobs: bool,
        make_event: Callable[[str, Sequence[ToldToken]], bytes] | None = None,
        num_chars: int = 0,
    ) -> None:
        """`make_event`: for streams; without it pieces are bare text. `num_chars`: of text before the first token."""
        super().__init__(texts, stops, limit, rules, frame)
        self.told: list[ToldToken] = []
        self._wants_logprobs = wants_logprobs
        self._make_event = make_event
        self._num_chars = num_chars
        self._waiting: list[ToldToken] = []
        self._logprobs: dict[int, TokenLogprobs] = {}  # by index, of tokens that have not been taken

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
        if self._waiting and self._make_event is not None:
            self._emit("", last=True)

    def _emit(self, text: str, last: bool = False) -> None:
        if not text and not last:
            return
        if self._make_event is None:
            self.pieces.append(json.dumps(text, ensure_ascii=False)[1:-1].encode())
            return
        self.pieces.append(self._make_event(text, self._waiting))
        self._waiting = []
