"""Clients under chaos: they stream, cancel, are reset, and ask again where their gateway died. Each answer is judged.

right       all tokens came, as in the undisturbed run
wrong       another text, a token lost, or one doubled: must not happen
failed      admitted, and ended by an error
refused     429 or 503 before anything was promised
cancelled   the client had enough; what it has must be a beginning of the right text
reset       its connection was reset
cut         its gateway was killed; it asks another one again
unreached   its gateway was not there to be connected to
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

from bench.chaos_cases import Case, Right
from bench.options import MODEL_NAME
from bench.stack import HOST
from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import Endpoint, Refused, ServerError
from kvferry_local.bench.stream import Stream, stream

Outcome = Literal["right", "wrong", "failed", "refused", "cancelled", "reset", "cut", "unreached"]
CANCEL_EVERY: Final = 8  # of steady requests
NOT_NOW: Final = (429, 503)
PATIENCE_S: Final = 0.25  # until a client that was refused asks again
GRACE_S: Final = 1.0  # between a gateway's death and what its clients notice of it
READ_TIMEOUT_S: Final = 180.0  # longer than `replace_wait`


@dataclass(slots=True)
class Asked:
    """One request of one client."""

    label: str
    case: Case
    port: int
    told_ids: bool  # whether it asks for token ids, too
    cancel_after: int | None  # events with text
    so_far: Stream = field(default_factory=Stream)
    outcome: Outcome | None = None
    status: int = 0  # of a refusal
    detail: str = ""
    was_reset: bool = False
    num_wrong: int = 0  # tokens, or 1 for a text whose tokens are not known
    num_lost: int = 0
    num_doubled: int = 0

    @property
    def admitted(self) -> bool:
        """Whether it counts for the share that must finish right: it was taken, and its client stayed."""
        return self.outcome in ("right", "wrong", "failed")

    @property
    def longest_pause(self) -> float:
        """Seconds between two events, from the sending on."""
        moments = [self.so_far.sent, *self.so_far.arrivals]
        return max((later - earlier for earlier, later in pairwise(moments)), default=0.0)

    def reset(self) -> None:
        """End the connection as a client that crashed does: by a TCP reset, not by an orderly end."""
        self.was_reset = True
        if (connection := self.so_far.connection) is not None:
            sock: socket.socket = connection.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.transport.abort()

    def judge(self, right: Right) -> None:
        """Compare what came with what is right. A text that was not read to its end must be a beginning of it."""
        answer = self.so_far
        if self.outcome != "right":
            self.num_wrong = int(not right.text.startswith(answer.text))
        else:
            wanted = len(right.token_ids)
            told = answer.usage["completion_tokens"] if answer.usage is not None else 0
            came = len(answer.token_ids) if self.told_ids else told
            self.num_lost, self.num_doubled = max(0, wanted - came), max(0, came - wanted)
            self.num_wrong = sum(a != b for a, b in zip(answer.token_ids, right.token_ids, strict=False))
            if not (self.num_lost or self.num_doubled or self.num_wrong):
                self.num_wrong = int(answer.text != right.text or told != wanted)
        if self.num_wrong or self.num_lost or self.num_doubled:
            self.outcome = "wrong"


class Clients:
    """All requests of a run, by label."""

    def __init__(self, ports: Sequence[int], right: Mapping[str, Right], prefix: str = "chaos") -> None:
        self.asked: dict[str, Asked] = {}
        self.killed: dict[int, list[float]] = {port: [] for port in ports}  # port -> when its gateway was killed
        self._right = right
        self._prefix = prefix
        self._ports = list(ports)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def live(self) -> dict[str, Asked]:
        """Those that a client waits for."""
        return {label: asked for label, asked in self.asked.items() if asked.outcome is None}

    def outcomes(self) -> Counter[str]:
        return Counter(asked.outcome or "unfinished" for asked in self.asked.values())

    def ask(self, case: Case, *, cancel_after: int | None = None) -> asyncio.Task[None]:
        """Send a request; the task ends with its outcome, and with those of its repeats where its gateway died."""
        number = len(self.asked)
        label = f"{self._prefix}-{number}"
        port = self._ports[number % len(self._ports)]
        asked = self.asked[label] = Asked(label, case, port, number % 2 == 0, cancel_after)
        task = asyncio.create_task(self._serve(asked), name=label)
        self._tasks.append(task)
        return task

    async def steady(self, cases: Sequence[Case], num_clients: int, stop: asyncio.Event) -> None:
        """So many clients, each of which asks one thing after the other until `stop`."""
        turn = itertools.count()

        async def one() -> None:
            while not stop.is_set():
                number = next(turn)
                cancel_after = 1 + number % 40 if number % CANCEL_EVERY == CANCEL_EVERY - 1 else None
                await self.ask(cases[number % len(cases)], cancel_after=cancel_after)

        await asyncio.gather(*(one() for _ in range(num_clients)))

    async def all_done(self) -> None:
        while waiting := [task for task in self._tasks if not task.done()]:
            await asyncio.gather(*waiting)

    # -- one request -----------------------------------------------------------------------------------------

    async def _serve(self, asked: Asked) -> None:
        asked.outcome = await self._read(asked)
        asked.judge(self._right[asked.case.name])
        if asked.outcome in ("refused", "unreached"):
            await asyncio.sleep(PATIENCE_S)
        elif asked.outcome == "cut":
            await self.ask(asked.case)

    async def _read(self, asked: Asked) -> Outcome:
        """Read to the end, or to where the client stops."""
        body = {"model": MODEL_NAME, **asked.case.body, "return_token_ids": asked.told_ids}

        def heard() -> None:
            if asked.cancel_after is not None and len(asked.so_far.arrivals) >= asked.cancel_after:
                reading.cancel()  # closes the connection

        endpoint, label = Endpoint(HOST, asked.port), {"x-request-id": asked.label}
        reading = asyncio.ensure_future(
            stream(endpoint, "/v1/completions", body, headers=label, into=asked.so_far, on_text=heard)
        )
        await asyncio.wait((reading,), timeout=READ_TIMEOUT_S)
        if not reading.done():
            reading.cancel()
            asked.detail = f"no end after {READ_TIMEOUT_S:g} s"
            return "failed"
        if reading.cancelled():
            return "cancelled"
        error = reading.exception()
        asked.detail = repr(error) if error is not None else ""
        match error:
            case None:
                return "right"  # as far as is known yet
            case Refused(status=status) if status in NOT_NOW:
                asked.status = status
                return "refused"
            case ServerError():
                return "failed"
            case OSError() | asyncio.IncompleteReadError():
                if asked.was_reset:
                    return "reset"
                if self._gateway_died(asked):
                    return "cut" if asked.so_far.connection is not None else "unreached"
                return "failed"
            case _:
                raise error

    def _gateway_died(self, asked: Asked) -> bool:
        """Whether its gateway was killed while it read, or not long before: it takes a while to be back."""
        now = blocking_clock()
        began = asked.so_far.sent if asked.so_far.connection is not None else now - READ_TIMEOUT_S
        return any(began - GRACE_S <= moment <= now for moment in self.killed[asked.port])
