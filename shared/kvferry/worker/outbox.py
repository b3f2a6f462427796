"""Tokens and ends on their way to gateways: batched per step, repeated until confirmed. Pure.

One `TokenBatch` per gateway and flush. A stream's tokens are kept until its end is acknowledged (or its
gateway has forgotten it), so that `Resend` can be served.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvferry.wire.logprobs import TokenLogprobs, pack_logprobs
from kvferry.wire.messages import End, EndReason, Held, TokenBatch, Work, pack_tokens

REPEAT_END_S: Final = 0.5
# Bounds of one batch, which is then smaller than NATS' default max_payload of 1 MiB.
MAX_BATCH_TOKENS: Final = 1 << 15
MAX_BATCH_LOGPROBS: Final = 1 << 11  # rows that have log-probabilities, up to 172 bytes each
MAX_BATCH_ENDS: Final = 96
MAX_BATCH_CACHED: Final = 1 << 13


@dataclass(slots=True)
class _Stream:
    work: Work
    first_index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of every token, or empty if they are not wanted
    cached_tokens: int = 0
    end: End | None = None
    repeat_at: float = 0.0


@dataclass(slots=True)
class _Mailbox:
    """What waits for one gateway."""

    subject: str
    incarnation: int
    batch_seq: int = 0
    streams: dict[int, _Stream] = field(default_factory=dict)
    stream_ids: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)  # (row of the columns above, …)
    ends: list[End] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)

    def add(self, stream: _Stream, offset: int) -> None:
        """A row for a stream's token with this offset from its first one."""
        if stream.logprobs:
            self.logprobs.append((len(self.tokens), stream.logprobs[offset]))
        self.stream_ids.append(stream.work.stream_id)
        self.indices.append(stream.first_index + offset)
        self.tokens.append(stream.tokens[offset])

    @property
    def waiting(self) -> bool:
        return bool(self.tokens or self.ends or self.cached)

    @property
    def num_rows_of_batch(self) -> int:
        if len(self.logprobs) > MAX_BATCH_LOGPROBS:
            return min(MAX_BATCH_TOKENS, self.logprobs[MAX_BATCH_LOGPROBS][0])
        return min(MAX_BATCH_TOKENS, len(self.tokens))


class Outbox:
    def __init__(self, incarnation: int) -> None:
        self._incarnation = incarnation
        self._mailboxes: dict[int, _Mailbox] = {}  # by gateway incarnation

    def __len__(self) -> int:
        return sum(len(box.streams) for box in self._mailboxes.values())

    def open(self, work: Work) -> None:
        box = self._mailboxes.get(work.gateway_incarnation)
        if box is None:
            box = self._mailboxes[work.gateway_incarnation] = _Mailbox(work.gateway, work.gateway_incarnation)
        box.streams[work.stream_id] = _Stream(work, len(work.generated) // 4)

    def token(self, work: Work, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """The next token of a stream; with log-probabilities either always or never."""
        found = self._find(work)
        if found is None:
            return
        box, stream = found
        assert index == stream.first_index + len(stream.tokens), "tokens come in order"
        stream.tokens.append(token)
        if logprobs is not None:
            stream.logprobs.append(logprobs)
        box.add(stream, len(stream.tokens) - 1)

    def cached(self, work: Work, num_tokens: int) -> None:
        """How many prompt tokens came from a prefix cache: for the usage figures."""
        found = self._find(work)
        if found is not None:
            box, stream = found
            stream.cached_tokens = num_tokens
            box.cached.append((work.stream_id, num_tokens))

    def end(self, work: Work, reason: EndReason, detail: str, now: float) -> None:
        found = self._find(work)
        if found is None or found[1].end is not None:
            return
        box, stream = found
        stream.end = End(work.stream_id, stream.first_index + len(stream.tokens), reason, detail[:1024])
        stream.repeat_at = now + REPEAT_END_S
        box.ends.append(stream.end)

    def close(self, work: Work) -> None:
        """The gateway wants nothing more of this stream."""
        found = self._find(work)
        if found is not None:
            del found[0].streams[work.stream_id]

    def acknowledge(self, gateway_incarnation: int, stream_ids: tuple[int, ...]) -> None:
        box = self._mailboxes.get(gateway_incarnation)
        for stream_id in stream_ids if box else ():
            assert box is not None
            if (stream := box.streams.get(stream_id)) is not None and stream.end is not None:
                del box.streams[stream_id]

    def resend(self, gateway_incarnation: int, streams: tuple[tuple[int, int], ...]) -> None:
        """Put tokens from the given indices on, and ends, into the next batch once more."""
        box = self._mailboxes.get(gateway_incarnation)
        # A stream asked for twice in one message is sent once.
        for stream_id, index in dict(streams).items() if box else ():
            assert box is not None
            stream = box.streams.get(stream_id)
            if stream is None:
                continue
            start = max(0, index - stream.first_index)
            for offset in range(start, len(stream.tokens)):
                box.add(stream, offset)
            if stream.end is not None:
                box.ends.append(stream.end)
            if stream.cached_tokens:
                box.cached.append((stream_id, stream.cached_tokens))

    def repeat_ends(self, now: float) -> None:
        """Queue ends that have waited too long for their acknowledgement."""
        for box in self._mailboxes.values():
            for stream in box.streams.values():
                if stream.end is not None and now >= stream.repeat_at:
                    stream.repeat_at = now + REPEAT_END_S
                    box.ends.append(stream.end)

    def take(self) -> list[tuple[str, TokenBatch]]:
        """(gateway subject, batch) for all that waits. A batch that gets lost leaves a gap in `batch_seq`."""
        batches: list[tuple[str, TokenBatch]] = []
        for box in self._mailboxes.values():
            while box.waiting:
                num_rows = box.num_rows_of_batch
                batch = TokenBatch(
                    self._incarnation,
                    box.batch_seq,
                    pack_tokens(box.stream_ids[:num_rows]),
                    pack_tokens(box.indices[:num_rows]),
                    pack_tokens(box.tokens[:num_rows]),
                    tuple(box.ends[:MAX_BATCH_ENDS]),
                    tuple(box.cached[:MAX_BATCH_CACHED]),
                    pack_logprobs([item for item in box.logprobs if item[0] < num_rows]) if box.logprobs else None,
                )
                for column in (box.stream_ids, box.indices, box.tokens):
                    del column[:num_rows]
                if box.logprobs:
                    box.logprobs = [(row - num_rows, found) for row, found in box.logprobs if row >= num_rows]
                del box.ends[:MAX_BATCH_ENDS]
                del box.cached[:MAX_BATCH_CACHED]
                box.batch_seq = (box.batch_seq + 1) & 0xFFFFFFFF
                batches.append((box.subject, batch))
        return batches

    def ended(self, gateway_incarnation: int) -> list[Work]:
        """Streams that have ended and wait for their acknowledgement."""
        box = self._mailboxes.get(gateway_incarnation)
        return [stream.work for stream in box.streams.values() if stream.end is not None] if box else []

    def held(self) -> dict[str, list[Held]]:
        """Ended streams as rows of a heartbeat, by gateway subject."""
        rows: dict[str, list[Held]] = {}
        for box in self._mailboxes.values():
            for stream_id, stream in box.streams.items():
                if stream.end is not None:
                    rows.setdefault(box.subject, []).append(Held(stream_id, "ended", stream.end.index))
        return rows

    def forget_gateway(self, gateway_incarnation: int) -> None:
        self._mailboxes.pop(gateway_incarnation, None)

    def _find(self, work: Work) -> tuple[_Mailbox, _Stream] | None:
        box = self._mailboxes.get(work.gateway_incarnation)
        stream = box.streams.get(work.stream_id) if box else None
        if box is None or stream is None or stream.work.key != work.key:
            return None
        return box, stream
