"""One pull as P sees it: what is sent, what may be sent next, and with how many credits. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Literal

from kvferry.schedule.step import KVFormat
from kvferry.wire.frame import Piece

MANIFEST: Final = "manifest"
PAD: Final = "pad"
MAX_AGAIN_QUEUED: Final = 256  # repeats that one pull may be owed at once
Content = Piece | Literal["manifest", "pad"]


def cut(kv: KVFormat, heads: range, token_start: int, token_end: int, max_bytes: int) -> list[Piece]:
    """Pieces of at most `max_bytes` that tile all layers of some heads of [token_start, token_end): by layers, then by
    tokens.

    Whole layers of a chunk keep the copies long; only a chunk whose single layer is too big is cut by tokens.
    """
    layer_token_bytes = kv.layer_token_bytes(heads)
    tokens_at_once = min(token_end - token_start, max_bytes // layer_token_bytes)
    pieces: list[Piece] = []
    for first in range(token_start, token_end, max(1, tokens_at_once)):
        last = min(token_end, first + tokens_at_once)
        layers_at_once = max(1, max_bytes // (layer_token_bytes * (last - first)))
        pieces += [
            Piece(layer, min(kv.num_layers, layer + layers_at_once), first, last, heads.start, heads.stop)
            for layer in range(0, kv.num_layers, layers_at_once)
        ]
    return pieces


@dataclass(slots=True)
class Outgoing:
    """State of one pull after Fetch.

    Every credit is used up: by KV, by the manifest, and at the end by pads, so that each receive that D has
    posted completes. Frame numbers are never reused; a repeat gets a new one.
    """

    pull_id: int
    from_token: int
    heads: range  # KV heads of the whole model
    credits: int
    next_frame: int = 0
    num_bytes: int = 0  # KV that has been packed
    manifest_sent: bool = False
    stopped: bool = False  # aborted or superseded: pads only
    _cursor: int = 0
    _queue: deque[Piece] = field(default_factory=deque)
    _again: deque[Content] = field(default_factory=deque)
    _sent: dict[int, Content] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cursor = self.from_token

    def computed(self, num_tokens: int, kv: KVFormat, max_bytes: int) -> None:
        """KV of the first `num_tokens` tokens is in the blocks."""
        if num_tokens > self._cursor:
            self._queue.extend(cut(kv, self.heads, self._cursor, num_tokens, max_bytes))
            self._cursor = num_tokens

    def ask_again(self, frames: tuple[int, ...]) -> bool:
        """D found these frames bad. False if one was never sent, or too many are asked for: distrust the peer."""
        if len(self._again) + len(frames) > MAX_AGAIN_QUEUED or any(frame not in self._sent for frame in frames):
            return False
        self._again.extend(self._sent[frame] for frame in frames)
        return True

    def next(self, finished: bool) -> tuple[int, Content] | None:
        """Take a credit: the next frame's number and content, or None. `finished`: token 0 is known."""
        if self.credits == 0:
            return None
        content: Content
        if self.stopped:
            content = PAD
        elif self._again:
            content = self._again.popleft()
        elif self._queue:
            content = self._queue.popleft()
        elif finished and not self.manifest_sent:
            content = MANIFEST
            self.manifest_sent = True
        elif self.manifest_sent:
            content = PAD
        else:
            return None
        self.credits -= 1
        frame = self.next_frame
        self.next_frame += 1
        if not self.stopped:
            self._sent[frame] = content
        return frame, content
