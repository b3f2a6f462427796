"""One choice's tokens, in order, and their text on its way to the client. The token path: nothing here waits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvferry.text.detokenizer import NOT_READY, TokenTexts
from kvferry.text.stop import StopMatcher
from kvferry.wire.logprobs import TokenLogprobs
from kvferry_gateway.answers.answer import COMMENT
from kvferry_gateway.answers.prompt_scores import PromptScores
from kvferry_gateway.http.connection import ClientConnection

if TYPE_CHECKING:
    from kvferry_gateway.streams.attempt import Attempt


def _escape(text: str) -> bytes:
    """For a JSON string, without quotes, as `ReadyTexts` has it of a token."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class TextRules:
    """How tokens become text, where it is not just theirs."""

    min_tokens: int = 0  # until then no stop string is looked for
    silent: frozenset[int] = frozenset()  # tokens that end the text and are no part of it
    include_stop: bool = False  # a stop string is a part of the text
    skip_special_tokens: bool = True
    shown: frozenset[int] = frozenset()  # special tokens that have a text even if others are skipped


PLAIN: Final = TextRules()
SLOW_S: Final = 1.0  # without a byte taken, by a client whose backlog is full


class TokenStream:
    """Lives as long as its request, over all attempts.

    `tokens[i]` is the token with index i; `held` has later ones that came before it. No write has taken `pieces`
    yet, and after them `texts`: pieces are SSE events if a stream was asked for, else parts of one JSON string; each
    text becomes one when it is written. `ready_texts[token]` is the text of the next token, None where only `append`
    can tell. `lead` goes out with the first of them, as vLLM's does: clients take its coming for the first token's.
    `attempt` is the one whose tokens are taken now.
    """

    __slots__ = (
        "_backlog",
        "_backlog_bytes",
        "_detokenizer",
        "_frame",
        "_glue",
        "_head",
        "_matcher",
        "_max_backlog",
        "_on_slow",
        "_own_texts",
        "_rules",
        "_tail",
        "attempt",
        "cached_tokens",
        "connection",
        "first_token_at",
        "held",
        "is_ending",
        "is_fresh",
        "last_token_at",
        "lead",
        "limit",
        "model",
        "num_timed",
        "on_first_token",
        "pieces",
        "ready_texts",
        "scores",
        "stopped",
        "texts",
        "tokens",
        "touched",
    )

    def __init__(
        self,
        texts: TokenTexts,
        stops: Sequence[str],
        limit: int,
        rules: TextRules = PLAIN,
        frame: Callable[[str], tuple[bytes, bytes]] | None = None,
    ) -> None:
        """`limit` is the request's max_tokens: an index from there on is never taken. `frame` gives what stands
        before and after the text of an event, once the numerics_id is known that the text comes from."""
        self.tokens: list[int] = []
        self.held: dict[int, int] = {}
        self.pieces: list[bytes] = []
        self.lead = b""
        self.limit = limit
        self.stopped = False  # a stop string was found: what follows is not taken
        self.touched = False  # the dispatcher will look at it in this turn of the loop
        self.attempt: Attempt | None = None
        self.model = ""
        self.is_fresh = False  # its attempt has given no token yet
        self.is_ending = False  # an end of its attempt has come, its tokens perhaps not
        self.cached_tokens = 0
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.num_timed = 0  # tokens that the latency figures have seen
        self.on_first_token: Callable[[], None] | None = None
        self.scores: PromptScores | None = None  # of its prompt, where they are asked for and it is the one to ask
        self.texts: list[bytes] = []  # escaped
        self._head = self._tail = self._glue = b""
        self._frame = frame
        self._rules = rules
        self._detokenizer = texts.stream(skip_special_tokens=rules.skip_special_tokens, shown=rules.shown)
        self._matcher = StopMatcher(stops) if stops else None
        # First bytes of the stop strings, escaped: a text without any of them begins none.
        self._own_texts = texts.ready(frozenset(_escape(stop[0])[0] for stop in stops))
        self.ready_texts = self._own_texts if self._may_be_plain else NOT_READY
        self.connection: ClientConnection | None = None
        self._max_backlog = 0
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._on_slow: Callable[[], None] | None = None

    def placed(self, numerics_id: str) -> None:
        """Its tokens will come from there. Called before the first one, again if that place fell through."""
        if self._frame is not None:
            self._head, self._tail = self._frame(numerics_id)
            self._glue = self._tail + self._head

    def join(self, attempt: Attempt) -> None:
        """Tokens are taken from this one from now on. What each step asks of it stands here: an attempt is a good part
        of what the processor would have to fetch for a token."""
        self.attempt, self.model = attempt, attempt.decode.model
        self.is_fresh, self.is_ending = True, False

    # -- tokens ----------------------------------------------------------------------------------------------

    def append(self, token: int) -> None:
        """Take the token with index `len(tokens)`, which is below `limit`."""
        if (text := self.ready_texts[token]) is not None:
            self.tokens.append(token)
            if text:
                self.texts.append(text)
        elif not self.stopped:
            self.tokens.append(token)
            self._append_text(self._text_of(token))
            is_plain = self._may_be_plain and not self._detokenizer.is_open
            self.ready_texts = self._own_texts if is_plain else NOT_READY

    @property
    def lacks_scores(self) -> bool:
        """Whether log-probabilities of the prompt are still to come."""
        return self.scores is not None and not self.scores.complete.is_set()

    def note_logprobs(self, index: int, found: TokenLogprobs) -> None:
        """Log-probabilities of a token that is about to come. A plain stream wants none."""

    @property
    def _may_be_plain(self) -> bool:
        rules, matcher = self._rules, self._matcher
        simple = not rules.silent and not rules.shown and rules.skip_special_tokens
        return simple and (matcher is None or matcher.is_idle)

    def _text_of(self, token: int) -> str:
        return "" if token in self._rules.silent else self._detokenizer.push(token)

    def settle(self, index: int, token: int) -> bool:
        """Take a token that is not simply the next one. False: another token is known for this index."""
        tokens, held = self.tokens, self.held
        if index < len(tokens):
            return tokens[index] == token
        if index >= self.limit:
            return True
        if held.setdefault(index, token) != token:
            return False
        while (following := held.pop(len(tokens), None)) is not None:
            self.append(following)
            if self.stopped:
                held.clear()
        return True

    def finish(self) -> None:
        """No token follows: what the detokeniser and the stop strings held back becomes text."""
        if self.stopped:
            return
        self._append_text(self._detokenizer.finish())
        if self._matcher is not None and not self.stopped:
            self._emit(self._matcher.finish())

    def _append_text(self, text: str) -> None:
        matcher = self._matcher
        # What belongs to the first `min_tokens` is text, whatever it spells.
        if matcher is not None and len(self.tokens) > self._rules.min_tokens:
            text, self.stopped = matcher.push(text)
            if self.stopped and self._rules.include_stop:
                text += matcher.matched or ""
        self._emit(text)

    def _emit(self, text: str) -> None:
        if text:
            self.texts.append(_escape(text))

    def put(self, event: bytes) -> None:
        """An event of its own, after all that has come."""
        self.pieces.append(self.take() + event)

    def take(self) -> bytes:
        """All pieces so far, joined and taken."""
        pieces, texts = self.pieces, self.texts
        body = b""
        if texts:
            body = self._head + (texts[0] if len(texts) == 1 else self._glue.join(texts)) + self._tail
            texts.clear()
        if pieces:
            body = b"".join(pieces) + body
            pieces.clear()
        if self.lead:
            body, self.lead = self.lead + body, b""
        return body

    # -- the client ------------------------------------------------------------------------------------------

    def attach(self, connection: ClientConnection, now: float, max_backlog: int, on_slow: Callable[[], None]) -> None:
        """The head of the response is out: from now on pieces are written. `on_slow`: the backlog is full, and the
        client takes nothing of it."""
        self.connection = connection
        self._max_backlog = max_backlog
        self._on_slow = on_slow
        connection.last_write = now
        self.flush(now)

    def flush(self, now: float) -> None:
        """Write what is due."""
        if (packed := self.due(now)) and self.connection is not None:
            self.connection.put(packed)

    def due(self, now: float) -> bytes:
        """All that there is, packed, to be put on the connection at once, if the client keeps up; else it is kept, up
        to the bound. What comes at once, as after an outage of the bus, may be more than that: it takes `SLOW_S` to
        be slow."""
        connection = self.connection
        if connection is None or not (self.texts or self.pieces):
            return b""
        body = self.take()
        if not connection.paused:
            connection.last_write = now
            return b"" if connection.lost else connection.pack(body)
        self._backlog.append(body)
        self._backlog_bytes += len(body)
        is_slow = self._backlog_bytes > self._max_backlog and now - connection.last_write >= SLOW_S
        if is_slow and self._on_slow is not None:
            on_slow, self._on_slow = self._on_slow, None
            on_slow()
        return b""

    def resume(self, now: float) -> None:
        """The client reads again."""
        connection = self.connection
        if connection is not None and self._backlog:
            body = b"".join(self._backlog)
            self._backlog.clear()
            self._backlog_bytes = 0
            connection.write(body)
            connection.last_write = now

    def close(self, last: bytes, now: float) -> None:
        """Write everything that is left and then `last`. The backlog is bounded, so a pause doesn't matter."""
        if self.connection is not None:
            self.connection.write(b"".join((*self._backlog, self.take(), last)))
            self.connection.last_write = now
        self.detach()

    def detach(self) -> None:
        self.connection = None
        self._backlog.clear()
        self.texts.clear()
        self.pieces.clear()

    def keep_alive(self, now: float, interval: float) -> None:
        """Break a silence of `interval` seconds with an SSE comment."""
        connection = self.connection
        if connection is not None and not connection.paused and now - connection.last_write >= interval:
            connection.write(COMMENT)
            connection.last_write = now
