"""NATS: whether it lets us in, how quickly it answers, whether whole prompts fit into its messages."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from kvferry.bus.base import Bus, BusMessage, BusSettings, least_payload
from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import users_of
from kvferry.bus.server import EmbeddedNats
from kvferry.errors import BusUnavailable, KvferryError, SettingError
from kvferry.runtime import Runtime, SystemRuntime, TaskSet, blocking_clock
from kvferry.wire.subjects import inbox_prefix
from kvferry_local.control_plane import check_logins, named_server
from kvferry_local.credentials import new_password
from kvferry_local.doctor.finding import Finding, failed, ok, warning
from kvferry_local.settings import DoctorSettings

NUM_ROUND_TRIPS: Final = 20
ROUND_TRIP_TIMEOUT_S: Final = 2.0
SLOW_ROUND_TRIP_S: Final = 0.02
ROLE: Final = "operator"
NAME: Final = "kvferry-doctor"


async def bus(settings: DoctorSettings, max_context: int) -> list[Finding]:
    """Of the server that is named, or that runs already; else of an embedded one, as `kvferry up` starts it."""
    runtime = SystemRuntime()
    try:
        async with _server(settings, runtime) as where:
            client = NatsBus(where, runtime)
            await client.start()
            try:
                found = [await _round_trip(where, client), _payload(client.max_payload, max_context)]
                if settings.nats_credentials is not None:
                    await check_logins(named_server(settings), runtime)
                return found
            finally:
                await client.close()
    except SettingError as error:
        return [failed("nats", error.problem, error.setting)]
    except BusUnavailable as error:
        remedy = "KVFERRY_NATS_URL, KVFERRY_NATS_USER, KVFERRY_NATS_PASSWORD" if settings.nats_url else "kvferry up"
        return [failed("nats", str(error), remedy)]
    except KvferryError as error:
        return [failed("nats", str(error), "see the log of the NATS server")]


@asynccontextmanager
async def _server(settings: DoctorSettings, runtime: Runtime) -> AsyncIterator[BusSettings]:
    if settings.nats_url:
        yield bus_login(named_server(settings).in_role(ROLE), ROLE, NAME)
        return
    (user,) = users_of(settings.cluster, {ROLE: new_password(runtime)})
    server = EmbeddedNats([user])
    await server.start()
    try:
        yield BusSettings(server.url, NAME, inbox_prefix(settings.cluster, ROLE), user.name, user.password)
    finally:
        await server.stop()


async def _round_trip(where: BusSettings, client: Bus) -> Finding:
    tasks = TaskSet(lambda name, error: None)  # an answer that is not sent is a question without one

    def answer(message: BusMessage) -> None:
        tasks.spawn(message.respond(message.payload), "answer")

    subject = f"{where.inbox_prefix}.doctor"
    subscription = await client.subscribe(subject, answer)
    seconds = []
    try:
        for _ in range(NUM_ROUND_TRIPS):
            began = blocking_clock()  # the loop's clock has whole milliseconds
            await client.request(subject, b"?", ROUND_TRIP_TIMEOUT_S)
            seconds.append(blocking_clock() - began)
    finally:
        await subscription.close()
        await tasks.cancel()
    median = statistics.median(seconds)
    detail = f"{_address(where.url)} lets us in and answers within {median * 1e3:.1f} ms"
    if median > SLOW_ROUND_TRIP_S:
        return warning("nats", detail, "a NATS server nearer to the workers, KVFERRY_NATS_URL")
    return ok("nats", detail)


def _payload(max_payload: int, max_context: int) -> Finding:
    needed = least_payload(max_context)
    detail = f"max_payload {max_payload:,} bytes, {needed:,} are needed for contexts of {max_context:,} tokens"
    if max_payload < needed:
        return failed("nats max_payload", detail, f"max_payload: {needed} in the server's file, or --max-model-len")
    return ok("nats max_payload", detail)


def _address(url: str) -> str:
    """Without credentials."""
    return ", ".join(part.rpartition("://")[2].rpartition("@")[2] for part in url.split(","))
