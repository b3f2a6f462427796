"""A real gateway without HTTP: its fleet, a flight per request, and clients that keep what they are sent."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workload import EOS, ClientRequest

from kvferry.runtime import TaskSet, now
from kvferry.text.detokenizer import TokenTexts
from kvferry.wire.messages import pack_tokens
from kvferry_gateway.connection import ClientConnection
from kvferry_gateway.errors import ApiError, ClientGone
from kvferry_gateway.fleet import Fleet
from kvferry_gateway.flight import Flight, Unit
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.settings import GatewaySettings
from kvferry_gateway.streams import TokenStream
from kvferry_gateway.targets import Targets

if TYPE_CHECKING:
    from world import World

RETRY_AFTER_S = 0.5  # a client's wait after a 429 or 503 that names no time


class Client(ClientConnection):
    """Reads everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = bytearray()

    def write(self, body: bytes) -> None:
        self.body += body

    def abort(self) -> None:
        self.note_lost()

    async def close(self) -> None:
        self.unwatch()

    @property
    def text(self) -> str:
        return json.loads(b'"' + bytes(self.body) + b'"')


@dataclass
class Call:
    """One request of a client and what has become of it."""

    request: ClientRequest
    client: Client = field(default_factory=Client)
    flight: Flight | None = None
    tokens: list[int] = field(default_factory=list)
    outcome: str = "open"  # then stop, length, client_gone, the error's code, or gateway_gone
    refusals: int = 0  # 429s and 503s before its stream began

    @property
    def stream(self) -> TokenStream | None:
        return None if self.flight is None else self.flight.stream


class GatewayCore:
    """Serves calls as the HTTP route does: take off, attach, land, close."""

    def __init__(self, world: World, name: str, texts: TokenTexts, **settings: Any) -> None:
        self.name = name
        self.calls: dict[int, Call] = {}
        self.bus = world.bus(name, "gateway")
        self._world = world
        self._texts = texts
        self._targets = settings.pop("targets", Targets())
        self._settings = GatewaySettings(name=name, **settings)
        self._tasks = TaskSet(lambda task, error: world.failures.append(f"{name}/{task}: {error!r}"))

    async def start(self) -> None:
        await self.bus.start()
        runtime, metrics = self._world.runtime, GatewayMetrics()
        self.fleet = Fleet(self._settings, runtime, self.bus, metrics, pid=1, targets=self._targets)
        await self.fleet.start()

    async def stop(self) -> None:
        """Only when every call is over."""
        await self.fleet.stop()
        await self.bus.close()
        assert len(self._tasks) == 0
        self.check_empty()

    def check_empty(self) -> None:
        """No table of the gateway remembers a request."""
        fleet = self.fleet
        assert len(fleet.table) == 0
        assert fleet.table.live() == ()
        assert not fleet.attached
        assert not fleet._dispatcher._touched
        assert not fleet._dispatcher._acks
        assert len(fleet.tasks) == 0

    def open(self, request: ClientRequest) -> Call:
        call = self.calls[request.number] = Call(request)
        self._tasks.spawn(self._serve(call), f"call-{request.number}")
        return call

    async def die(self) -> None:
        """As SIGKILL does: no word to anybody."""
        self._world.broker.cut(self.bus)
        await self._tasks.cancel()
        await self.fleet.tasks.cancel()
        await self.bus.close()

    # -- one call --------------------------------------------------------------------------------------------

    async def _serve(self, call: Call) -> None:
        try:
            call.outcome = await self._stream(call)
        except ClientGone:
            call.outcome = "client_gone"
        except ApiError as error:
            call.outcome = error.code or str(error.status)
        except asyncio.CancelledError:
            call.outcome = "gateway_gone"
            raise
        finally:
            self._world.log.record("call", call.request.number, call.outcome, len(call.tokens))
            self._world.changed()

    async def _stream(self, call: Call) -> str:
        while True:
            flight = call.flight = self._flight(call)
            stream = flight.stream
            call.client.watch(flight.abandon, lambda stream=stream: stream.resume(now()))
            try:
                await flight.take_off()
                stream.attach(call.client, now(), self._settings.max_backlog_bytes, call.client.abort)
                self.fleet.attached[stream] = None
                reason = await flight.land()
                stream.finish()
                stream.close(b"", now())
                return reason
            except ApiError as error:
                if stream in self.fleet.attached or error.status not in (429, 503):
                    raise
                call.refusals += 1
            finally:
                call.tokens = stream.tokens
                self.fleet.attached.pop(stream, None)
                stream.detach()
                flight.close()
            await asyncio.sleep(RETRY_AFTER_S)
            if call.client.lost:
                raise ClientGone("while it waited to try again")

    def _flight(self, call: Call) -> Flight:
        request = call.request
        unit = Unit(
            number=request.number + 1,
            request_id=f"r{request.number}",
            model="memory",
            prompt=pack_tokens(request.prompt),
            sampling=request.sampling,
            salt=b"",
            arrival=request.arrival,
            prompt_field="prompt",
        )
        stream = TokenStream(self._texts, (), request.sampling.max_tokens)
        return Flight(self.fleet, unit, stream, frozenset({EOS}))
