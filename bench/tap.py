"""A listener on the control plane: which tokens each request was given, by id, over all its attempts.

HTTP carries text, and text does not name its tokens. The bus does, so the bench subscribes beside gateway
and workers and changes nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from kvferry.bus.base import BusMessage, BusSettings
from kvferry.bus.nats import NatsBus
from kvferry.errors import WireError
from kvferry.runfile import RunFile
from kvferry.runtime import SystemRuntime
from kvferry.wire.messages import Codecs, DecodeRequest, PrefillRequest, Sampling, TokenBatch, unpack_tokens
from kvferry.wire.subjects import ROOT, inbox_prefix

ROLE: Final = "bench"


@dataclass(slots=True)
class Heard:
    """One request as the bus saw it."""

    prompt: list[int]
    sampling: Sampling  # of its first attempt: `max_tokens` and seed stay the same
    choice: int
    attempts: set[int] = field(default_factory=set)
    tokens: dict[int, int] = field(default_factory=dict)  # generated index -> token id
    contradictions: int = 0  # an index that was given two different ids

    @property
    def generated(self) -> list[int]:
        """Raises KeyError if an index never came."""
        return [self.tokens[index] for index in range(len(self.tokens))]


class Tap:
    """Requests by their x-request-id, one choice each."""

    def __init__(self) -> None:
        self.requests: dict[str, Heard] = {}
        self._streams: dict[int, Heard] = {}
        self._codecs = Codecs()

    def on_request(self, message: BusMessage) -> None:
        """A message to a worker."""
        try:
            request = self._codecs.to_worker.decode(message.payload)
        except WireError:
            return
        if isinstance(request, PrefillRequest | DecodeRequest):
            work = request.work
            heard = self.requests.setdefault(
                work.request_id, Heard(unpack_tokens(work.prompt).tolist(), work.sampling, work.choice)
            )
            heard.attempts.add(work.attempt)
            self._streams[work.stream_id] = heard

    def on_tokens(self, message: BusMessage) -> None:
        """A message to a gateway."""
        try:
            batch = self._codecs.to_gateway.decode(message.payload)
        except WireError:
            return
        for stream_id, index, token in _rows(batch):
            heard = self._streams.get(stream_id)
            if heard is not None and heard.tokens.setdefault(index, token) != token:
                heard.contradictions += 1


def _rows(batch: TokenBatch) -> Iterator[tuple[int, int, int]]:
    columns = (unpack_tokens(column).tolist() for column in (batch.stream_ids, batch.indices, batch.tokens))
    return zip(*columns, strict=True)


@asynccontextmanager
async def tapped(run_file: RunFile) -> AsyncIterator[Tap]:
    """Listen while the block runs."""
    tap = Tap()
    bus = NatsBus(
        BusSettings(
            url=run_file.nats_url,
            name="kvferry-bench",
            inbox_prefix=inbox_prefix(run_file.cluster, ROLE),
            user=run_file.nats_user,
            password=run_file.nats_password.get_secret_value(),
            token=run_file.nats_token.get_secret_value(),
            tls_ca=run_file.nats_tls_ca,
        ),
        SystemRuntime(),
    )
    await bus.start()
    try:
        for role in ("prefill", "decode"):
            await bus.subscribe(f"{ROOT}.{run_file.cluster}.{role}.>", tap.on_request)
        await bus.subscribe(f"{ROOT}.{run_file.cluster}.gateway.>", tap.on_tokens)
        yield tap
    finally:
        await bus.close()
