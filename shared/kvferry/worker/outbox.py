"""Tokens and ends on their way to gateways: batched per step, repeated until confirmed. Pure.

One `TokenBatch` per gateway and flush. A stream's tokens are kept until its end is acknowledged (or its
gateway has forgotten it), so that `Resend` can be served. Log-probabilities of its prompt are kept until they are
acknowledged themselves, even when all else of the stream is another worker's by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvferry.wire.beats import Held
from kvferry.wire.fields import pack_tokens
from kvferry.wire.logprobs import PromptLogprobs, TokenLogprobs, pack_logprobs, pack_prompt_logprobs
from kvferry.wire.tokens import MAX_SCORED_ROWS, End, EndReason, PromptLogprobColumns, Spent, TokenBatch
from kvferry.wire.work import Work

REPEAT_END_S: Final = 0.5
# Bounds of one batch, which is then smaller than NATS' default max_payload of 1 MiB.
MAX_BATCH_TOKENS: Final = 1 << 15
MAX_BATCH_LOGPROBS: Final = 1 << 11  # rows that have log-probabilities, up to 172 bytes each
MAX_BATCH_ENDS: Final = 96
MAX_BATCH_CACHED: Final = 1 << 13
MAX_BATCH_SPENT: Final = 1 << 9  # 42 bytes each


@dataclass(slots=True)
class _Stream:
    work: Work
    first_index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of every token, or empty if they are not wanted
    cached_tokens: int = 0
    spent: Spent | None = None
    end: End | None = None
    repeat_at: float = 0.0
    prompt: list[PromptLogprobs] = field(default_factory=list)  # not acknowledged, by position
    is_over: bool = False  # this worker's part, but for `prompt`

    @property
    def next_index(self) -> int:
        return self.first_index + len(self.tokens)

    @property
    def next_scored(self) -> int:
        """Position behind the prompt's last token whose log-probabilities are here; 0 without any."""
        return self.prompt[-1].end if self.prompt else 0


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
    spent: list[Spent] = field(default_factory=list)
    prompts: list[tuple[int, PromptLogprobs]] = field(default_factory=list)  # (stream_id, a run), each within a batch

    def add(self, stream: _Stream, offset: int) -> None:
        """A row for a stream's token with this offset from its first one."""
        if stream.logprobs:
            self.logprobs.append((len(self.tokens), stream.logprobs[offset]))
        self.stream_ids.append(stream.work.stream_id)
        self.indices.append(stream.first_index + offset)
        self.tokens.append(stream.tokens[offset])

    @property
    def waiting(self) -> bool:
        return bool(self.tokens or self.ends or self.cached or self.prompts or self.spent)

    @property
    def num_rows_of_batch(self) -> int:
        if len(self.logprobs) > MAX_BATCH_LOGPROBS:
            return min(MAX_BATCH_TOKENS, self.logprobs[MAX_BATCH_LOGPROBS][0])
        return min(MAX_BATCH_TOKENS, len(self.tokens))

    def score(self, stream: _Stream, start: int) -> None:
        """Runs for a prompt's log-probabilities from a position on."""
        for found in stream.prompt:
            for begin in range(max(start, found.start), found.end, MAX_SCORED_ROWS):
                self.prompts.append((stream.work.stream_id, found.part(begin, min(begin + MAX_SCORED_ROWS, found.end))))

    def take_prompts(self) -> tuple[PromptLogprobColumns, ...]:
        """Runs that fit one batch."""
        num_rows = num_runs = 0
        for _, found in self.prompts:
            num_rows += found.end - found.start
            if num_rows > MAX_SCORED_ROWS:
                break
            num_runs += 1
        taken, self.prompts = self.prompts[:num_runs], self.prompts[num_runs:]
        return tuple(pack_prompt_logprobs(stream_id, found) for stream_id, found in taken)


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

    def spent(self, work: Work, seconds: Spent) -> None:
        """Where the time of a stream went until the first token that was drawn here."""
        found = self._find(work)
        if found is not None:
            box, stream = found
            stream.spent = seconds
            box.spent.append(seconds)

    def scored(self, work: Work, prompt: PromptLogprobs) -> None:
        """Log-probabilities of the prompt's tokens behind those that were given before."""
        found = self._find(work)
        if found is not None:
            box, stream = found
            stream.prompt.append(prompt)
            box.score(stream, prompt.start)

    def next_scored(self, work: Work) -> int:
        """Position behind the prompt's last token whose log-probabilities wait to be acknowledged; 0: none do."""
        found = self._find(work)
        return 0 if found is None else found[1].next_scored

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
        stream.end = End(work.stream_id, stream.next_index, reason, detail[:1024])
        stream.repeat_at = now + REPEAT_END_S
        box.ends.append(stream.end)

    def close(self, work: Work) -> None:
        """The gateway wants nothing more of this stream."""
        found = self._find(work)
        if found is not None:
            del found[0].streams[work.stream_id]

    def leave(self, work: Work) -> None:
        """Nothing more comes for this stream: its tokens are another worker's now."""
        found = self._find(work)
        if found is not None:
            box, stream = found
            stream.is_over = True
            if not stream.prompt:
                del box.streams[work.stream_id]

    def acknowledge(self, gateway_incarnation: int, stream_ids: tuple[int, ...], scored: tuple[int, ...] = ()) -> None:
        """Forget streams whose end has arrived, and of those in `scored` their prompt's log-probabilities."""
        box = self._mailboxes.get(gateway_incarnation)
        if box is None:
            return
        for stream_id in stream_ids:
            stream = box.streams.get(stream_id)
            if stream is not None and (stream.end is not None or stream.is_over):
                del box.streams[stream_id]
        for stream_id in scored:
            if (stream := box.streams.get(stream_id)) is not None:
                stream.prompt.clear()
                if stream.is_over:
                    del box.streams[stream_id]

    def resend(
        self,
        gateway_incarnation: int,
        streams: tuple[tuple[int, int], ...],
        prompts: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Put tokens from the given indices on, ends, and prompts' log-probabilities from the given positions on, into
        the next batches once more."""
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
            if stream.spent is not None:
                box.spent.append(stream.spent)
        for stream_id, position in dict(prompts).items() if box else ():
            assert box is not None
            if (stream := box.streams.get(stream_id)) is not None:
                box.score(stream, position)

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
                    box.take_prompts() if box.prompts else (),
                    tuple(box.spent[:MAX_BATCH_SPENT]),
                )
                for column in (box.stream_ids, box.indices, box.tokens):
                    del column[:num_rows]
                if box.logprobs:
                    box.logprobs = [(row - num_rows, found) for row, found in box.logprobs if row >= num_rows]
                del box.ends[:MAX_BATCH_ENDS]
                del box.cached[:MAX_BATCH_CACHED]
                del box.spent[:MAX_BATCH_SPENT]
                box.batch_seq = (box.batch_seq + 1) & 0xFFFFFFFF
                batches.append((box.subject, batch))
        return batches

    def ended(self, gateway_incarnation: int) -> list[Work]:
        """Streams that have ended, or are over, and wait for an acknowledgement."""
        box = self._mailboxes.get(gateway_incarnation)
        return [s.work for s in box.streams.values() if s.end is not None or s.is_over] if box else []

    def held(self) -> dict[str, list[Held]]:
        """Streams that have ended, or are over, as rows of a heartbeat, by gateway subject."""
        rows: dict[str, list[Held]] = {}
        for box in self._mailboxes.values():
            for stream_id, stream in box.streams.items():
                if stream.end is not None or stream.is_over:
                    row = Held(stream_id, "ended", stream.next_index, stream.next_scored)
                    rows.setdefault(box.subject, []).append(row)
        return rows

    def forget_gateway(self, gateway_incarnation: int) -> None:
        self._mailboxes.pop(gateway_incarnation, None)

    def _find(self, work: Work) -> tuple[_Mailbox, _Stream] | None:
        box = self._mailboxes.get(work.gateway_incarnation)
        stream = box.streams.get(work.stream_id) if box else None
        if box is None or stream is None or stream.work.key != work.key:
            return None
        return box, stream
