"""The stack under chaos, seen from outside: who lives, and which request is where, in which phase."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from bench.books import Books, Row
from bench.processes import stack_processes
from bench.stack import HOST, Stack
from bench.tap import Heard, Tap
from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import Endpoint, ServerError

Phase = Literal["queued", "computing", "held", "fetching", "running"]
PHASES: Final[tuple[Phase, ...]] = ("queued", "computing", "held", "fetching", "running")
HTTP_TIMEOUT_S: Final = 5.0
POLL_S: Final = 0.05
FRESH_S: Final = 1.0  # since a worker's last heartbeat
# What a block ledger's state means, by role. Reserved blocks are taken for what comes next.
_PHASE_OF: Final[Mapping[tuple[str, str], Phase]] = {
    ("prefill", "reserved"): "computing",
    ("prefill", "running"): "computing",
    ("prefill", "held"): "held",
    ("decode", "reserved"): "fetching",
    ("decode", "fetching"): "fetching",
    ("decode", "running"): "running",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request was at one moment."""

    phase: Phase
    attempt: int


def places_on(row: Row, books: Books, requests: Mapping[str, Heard], live: Iterable[str]) -> dict[str, Place]:
    """The live requests that need this worker, and for what."""
    states = {(hold["ticket"], hold["attempt"]): hold["state"] for hold in books["holdings"]}
    incarnation = int(row["incarnation"], 16)
    found = {}
    for label in live:
        heard = requests.get(label)
        if heard is None or not heard.on(incarnation) or heard.last.accepted_at is None:
            continue
        attempt = heard.last
        state = states.get((attempt.ticket.hex(), attempt.number))
        if state is not None:
            found[label] = Place(_PHASE_OF[row["role"], state], attempt.number)
        elif row["role"] == "prefill" and not attempt.tokens:
            found[label] = Place("queued", attempt.number)  # it holds nothing, and nothing has come of it
    return found


class Fleet:
    """Reads gateways, workers and processes of one stack."""

    def __init__(self, stack: Stack, tap: Tap, num_workers: int) -> None:
        self.tap = tap
        self.ended: set[str] = set()  # incarnations that were killed or told to go: no gateway may have noticed yet
        self._stack = stack
        self._num_workers = num_workers

    async def whole(self, seconds: float) -> list[Row]:
        """Wait until every gateway sees all workers, ready and heard of late. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while True:
                views = await asyncio.gather(*(self._rows(port) for port in self._stack.ports))
                if all(len(view) == self._num_workers for view in views):
                    return views[0]
                await asyncio.sleep(POLL_S)

    async def books(self, row: Row) -> Books:
        """Raises OSError, `ServerError` or TimeoutError of a worker that is not there."""
        books: Books = await Endpoint(HOST, row["debug_port"]).get_json("/debug/blocks", HTTP_TIMEOUT_S)
        return books

    async def places(self, row: Row, live: Iterable[str]) -> dict[str, Place]:
        return places_on(row, await self.books(row), self.tap.requests, live)

    def pid_of(self, name: str) -> int:
        """Raises StopIteration when no process of that name runs."""
        return next(process.pid for process in stack_processes(self._stack.pid) if process.name == name)

    def pids(self) -> list[int]:
        return [process.pid for process in stack_processes(self._stack.pid)]

    def attempts_of(self, gateway: str) -> set[tuple[str, int]]:
        """Every attempt that a gateway of this name has placed so far, as books write it: ticket and number."""
        return {
            (attempt.ticket.hex(), attempt.number)
            for heard in self.tap.requests.values()
            for attempt in heard.attempts.values()
            if attempt.gateway.split(".")[3] == gateway
        }

    async def seconds_until_free(self, gateway: str, since: float, limit: float) -> float:
        """From a gateway's death until no worker holds a block for what it had asked; `limit` if that is longer."""
        attempts = self.attempts_of(gateway)
        while (passed := blocking_clock() - since) < limit:
            rows = await self._rows_of_any()
            books = await asyncio.gather(*(self.books(row) for row in rows), return_exceptions=True)
            held = [
                hold
                for book in books
                if not isinstance(book, BaseException)
                for hold in book["holdings"]
                if (hold["ticket"], hold["attempt"]) in attempts
            ]
            if rows and not held:
                return blocking_clock() - since
            await asyncio.sleep(POLL_S)
        return passed

    async def _rows_of_any(self) -> list[Row]:
        """As the first gateway that answers sees them."""
        for port in self._stack.ports:
            if rows := await self._rows(port):
                return rows
        return []

    async def _rows(self, port: int) -> list[Row]:
        """The workers that a gateway may use now; none if it does not answer."""
        try:
            document = await Endpoint(HOST, port).get_json("/v1/cluster", HTTP_TIMEOUT_S)
        except (OSError, ServerError, TimeoutError, asyncio.IncompleteReadError):
            return []
        return [
            row
            for row in document["workers"]
            if row["state"] == "ready" and row["silent_s"] < FRESH_S and row["incarnation"] not in self.ended
        ]
