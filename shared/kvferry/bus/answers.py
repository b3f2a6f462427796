"""Requests that wait for their answer. All answers of a process come in by one subscription."""

from __future__ import annotations

import asyncio

from kvferry.errors import BusUnavailable


class NobodyListens(Exception):
    """Stands in for an answer where the server found no subscription."""


class Answers:
    """Matches answers to requests by the last token of the subject they come on."""

    def __init__(self, inbox: str) -> None:
        self._inbox = inbox
        self._next_token = 0
        self._waiting: dict[str, asyncio.Future[bytes]] = {}

    @property
    def pattern(self) -> str:
        """What to subscribe to, for the life of the process."""
        return f"{self._inbox}.*"

    def open(self) -> tuple[str, asyncio.Future[bytes]]:
        """The subject for one answer, and its future. The caller drops the subject when it waits no more."""
        subject = f"{self._inbox}.{self._next_token}"
        self._next_token += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[subject] = future
        return subject, future

    def drop(self, subject: str) -> None:
        future = self._waiting.pop(subject, None)
        if future is not None:
            future.cancel()

    def arrived(self, subject: str, payload: bytes, *, no_responders: bool) -> None:
        """A late or doubled answer finds nobody and is ignored."""
        future = self._waiting.pop(subject, None)
        if future is None or future.done():
            return
        if no_responders:
            future.set_exception(NobodyListens())
        else:
            future.set_result(payload)

    def fail_all(self, reason: str) -> None:
        """The connection is gone, and with it every answer."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(BusUnavailable(reason))
