"""From token batches to streams. The hot path of the gateway: one walk per batch, one write per stream and turn.

A row is fenced by one look-up: its stream_id is known only while its attempt is the current one, and only if the sender
is one of that attempt's workers.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from struct import unpack
from typing import Final

import numpy as np

from kvferry.errors import MalformedMessage
from kvferry.wire.logprobs import PromptLogprobs, unpack_logprobs, unpack_prompt_logprobs
from kvferry.wire.tokens import TokenBatch
from kvferry_gateway.http.connection import ClientConnection
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.streams.attempt import Attempt, AttemptTable, Lost
from kvferry_gateway.streams.stream import TokenStream

_HALF: Final = 1 << 31
_MASK: Final = (1 << 32) - 1


class WorkerMail(ABC):
    """What the dispatcher has to tell workers."""

    @abstractmethod
    def acknowledge(self, incarnation: int, stream_ids: tuple[int, ...], scored: tuple[int, ...]) -> None:
        """These ends need not be repeated, and of `scored` the log-probabilities of the prompt not be kept."""

    @abstractmethod
    def resend(
        self, incarnation: int, streams: tuple[tuple[int, int], ...], prompts: tuple[tuple[int, int], ...], cause: str
    ) -> None:
        """Publish tokens of (stream_id, from index) and prompts' log-probabilities of (stream_id, from position) again.
        `cause` labels the counter."""


class Dispatcher:
    """Takes batches as they come: doubled, late, out of order, or never."""

    def __init__(self, table: AttemptTable, mail: WorkerMail, metrics: GatewayMetrics) -> None:
        self._table = table
        self._mail = mail
        self._metrics = metrics
        self._touched: list[TokenStream] = []
        self._acks: dict[int, dict[int, None]] = {}  # incarnation -> stream ids
        self._scored: dict[int, dict[int, None]] = {}  # the same, of prompts whose log-probabilities are all here
        self._scheduled = False
        self._expected: dict[int, int] = {}  # incarnation -> batch_seq of its next batch

    def forget_worker(self, incarnation: int) -> None:
        self._expected.pop(incarnation, None)

    def take(self, batch: TokenBatch) -> None:
        """Raises `MalformedMessage` for columns that don't fit together; nothing is taken then."""
        size = len(batch.stream_ids)
        if size % 4 or len(batch.indices) != size or len(batch.tokens) != size:
            raise MalformedMessage("token columns of unequal length")
        logprobs = None if batch.logprobs is None else unpack_logprobs(batch.logprobs, size // 4)
        prompts = [(columns.stream_id, unpack_prompt_logprobs(columns)) for columns in batch.prompts]
        self._check_sequence(batch)
        attempts = self._table.of(batch.incarnation)
        if logprobs is not None:
            stream_ids, indices = np.frombuffer(batch.stream_ids, "<u4"), np.frombuffer(batch.indices, "<u4")
            for row, found in logprobs:
                if (attempt := attempts.get(int(stream_ids[row]))) is not None:
                    attempt.stream.note_logprobs(int(indices[row]), found)
        if size:
            self._take_rows(batch)
        for stream_id, scores in prompts:
            if (attempt := attempts.get(stream_id)) is not None:
                self._take_scores(attempt, scores, batch.incarnation)
        for stream_id, count in batch.cached:
            if (attempt := attempts.get(stream_id)) is not None:
                attempt.stream.cached_tokens = count
        for spent in batch.spent:
            if (attempt := attempts.get(spent.stream_id)) is not None:
                attempt.spent.setdefault(batch.incarnation, (asyncio.get_running_loop().time(), spent))
        for end in batch.ends:
            attempt = attempts.get(end.stream_id)
            # An unknown one is confirmed, too: the worker would repeat it for ever.
            if attempt is None or attempt.ended(end, batch.incarnation):
                self.acknowledge(batch.incarnation, end.stream_id)
            if attempt is not None:
                self._touch(attempt.stream)

    def acknowledge(self, incarnation: int, stream_id: int) -> None:
        """Confirm an end, together with all others of this turn."""
        self._acks.setdefault(incarnation, {})[stream_id] = None
        self._schedule()

    def _take_rows(self, batch: TokenBatch) -> None:
        get = self._table.streams_of(batch.incarnation).get
        touched = self._touched
        late = 0
        column = f"<{len(batch.stream_ids) // 4}I"
        for stream_id, index, token in zip(
            unpack(column, batch.stream_ids), unpack(column, batch.indices), unpack(column, batch.tokens), strict=True
        ):
            stream = get(stream_id)
            if stream is None:
                late += 1
                continue
            tokens = stream.tokens
            if index == len(tokens) and index < stream.limit and not stream.held:
                if (text := stream.ready_texts[token]) is None:
                    stream.append(token)
                else:  # as `append` does, without its call
                    tokens.append(token)
                    if text:
                        stream.texts.append(text)
            else:
                self._settle(stream, index, token, batch.incarnation)
            if not stream.touched:
                stream.touched = True
                touched.append(stream)
        if late:
            self._metrics.late_rows.inc(late)
        if touched:
            self._schedule()

    def _settle(self, stream: TokenStream, index: int, token: int, incarnation: int) -> None:
        attempt = stream.attempt
        if stream.stopped or attempt is None:
            return
        if incarnation == attempt.decode.incarnation:
            attempt.running_seen = True
        if not stream.settle(index, token):
            self._metrics.mismatches.inc()
            attempt.conclude(Lost("token_mismatch"))
            self._table.remove(attempt)  # now: the rest of this batch must not be taken

    def _take_scores(self, attempt: Attempt, found: PromptLogprobs, incarnation: int) -> None:
        scores = attempt.stream.scores
        if scores is None or attempt.scorer.incarnation != incarnation or not scores.take(found):
            attempt.break_off()
        elif scores.complete.is_set():
            self._scored.setdefault(incarnation, {})[attempt.stream_id] = None
            self._touch(attempt.stream)

    def _touch(self, stream: TokenStream) -> None:
        if not stream.touched:
            stream.touched = True
            self._touched.append(stream)
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._end_of_turn)

    def _end_of_turn(self) -> None:
        """Write every touched stream once, see which choices are complete, confirm ends."""
        self._scheduled = False
        now = asyncio.get_running_loop().time()
        itl, gap, model, alike = self._metrics.itl, 0.0, "", 0  # streams of one batch are mostly alike
        touched, self._touched = self._touched, []
        due: list[tuple[ClientConnection, bytes]] = []
        for stream in touched:
            stream.touched = False
            num_tokens = len(stream.tokens)
            if num_tokens > stream.num_timed:
                stream.num_timed = num_tokens
                if stream.is_fresh:
                    self._begins(stream, now)
                if stream.first_token_at != now:
                    if now - stream.last_token_at != gap or stream.model != model:
                        if alike:
                            itl.observe(model, gap, alike)
                        gap, model, alike = now - stream.last_token_at, stream.model, 0
                    alike += 1
                stream.last_token_at = now
            if (packed := stream.due(now)) and stream.connection is not None:
                due.append((stream.connection, packed))
            if (stream.stopped or stream.is_ending) and stream.attempt is not None:
                stream.attempt.review()
        if alike:
            itl.observe(model, gap, alike)
        for connection, packed in due:
            connection.put(packed)
        acks, self._acks = self._acks, {}
        scored, self._scored = self._scored, {}
        for incarnation in acks | scored:
            ended, told = acks.get(incarnation, ()), scored.get(incarnation, ())
            self._mail.acknowledge(incarnation, tuple(ended), tuple(told))

    def _begins(self, stream: TokenStream, now: float) -> None:
        """The first token of its attempt, or of all."""
        stream.is_fresh = False
        if stream.first_token_at is None:
            stream.first_token_at = now
            if stream.on_first_token is not None:
                stream.on_first_token()
        if stream.attempt is not None and stream.attempt.forecast.first_token_at is None:
            stream.attempt.forecast.began(now)

    def _check_sequence(self, batch: TokenBatch) -> None:
        """Ask for what a gap in the batch numbers has swallowed."""
        incarnation, seq = batch.incarnation, batch.batch_seq
        expected = self._expected.get(incarnation, 0)
        ahead = (seq - expected) & _MASK
        # A worker that had forgotten this gateway begins at 0 again.
        if ahead >= _HALF and seq != 0:
            return  # late or doubled: the streams sort it out
        self._expected[incarnation] = (seq + 1) & _MASK
        if 0 < ahead < _HALF:
            attempts = self._table.of_worker(incarnation)
            streams = tuple((a.stream_id, len(a.stream.tokens)) for a in attempts)
            lacking = tuple(
                (attempt.stream_id, scores.next)
                for attempt in attempts
                if (scores := attempt.stream.scores) is not None and attempt.stream.lacks_scores
            )
            if streams:
                self._mail.resend(incarnation, streams, lacking, "gap")
