"""Received messages of one subscription, waiting for its handler."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from kvferry.bus.base import BusCounters, BusMessage, Handler

MAX_PENDING_MESSAGES: Final = 1 << 16
MAX_PENDING_BYTES: Final = 64 << 20
MAX_CALLS_PER_TURN: Final = 256  # handler calls before other work of the event loop gets its turn


class Inlet:
    """Bounded queue between the bus and one handler.

    The handler runs from the event loop and not where the message is parsed, so that it may do anything,
    and one wake-up serves all messages that came in one read. A queue over its bounds drops the newest.
    """

    def __init__(self, handler: Handler, counters: BusCounters, log: Any, max_pending: int) -> None:
        self._handler = handler
        self._counters = counters
        self._log = log
        self._max_pending = max_pending
        self._waiting: deque[BusMessage] = deque()
        self._waiting_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._drain_scheduled = False
        self._overfull = False
        self.closed = False

    def put(self, message: BusMessage) -> None:
        """Never raises: it is called from inside the reader of the connection."""
        if self.closed:
            return
        size = len(message.payload)
        if self._waiting and (
            len(self._waiting) >= self._max_pending or self._waiting_bytes + size > MAX_PENDING_BYTES
        ):
            self._counters.dropped += 1
            if not self._overfull:  # one line per episode, not per message
                self._overfull = True
                self._log.warning("subscription overfull, dropping messages", subject=message.subject)
            return
        self._waiting.append(message)
        self._waiting_bytes += size
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def close(self) -> None:
        self.closed = True
        self._waiting.clear()

    def _drain(self) -> None:
        self._drain_scheduled = False
        for _ in range(min(len(self._waiting), MAX_CALLS_PER_TURN)):
            if not self._waiting:  # the handler closed its own subscription
                return
            message = self._waiting.popleft()
            self._waiting_bytes -= len(message.payload)
            try:
                self._handler(message)
            except Exception:
                self._counters.handler_errors += 1
                self._log.exception("bus handler failed", subject=message.subject)
        if self._waiting:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)
        else:
            self._overfull = False
