"""Publishes on a bus what nobody should: garbage, old messages, changed ones, and valid ones that nobody meant."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
from api_cluster import ApiCluster
from fuzz import junk
from fuzz.campaign import Batch
from fuzz.messages import Ids, Messages
from fuzz.spoiling import spoiled

from kvferry.bus.base import BusMessage
from kvferry.errors import BusError, WireError
from kvferry.wire.beats import Heartbeat
from kvferry.wire.codec import Codec
from kvferry.wire.fields import WORKER_ROLES, unpack_tokens
from kvferry.wire.messages import Answer, Beat, CacheNews, Codecs, ToGateway, ToWorker
from kvferry.wire.subjects import beat_subject, cache_subject, exit_subject
from kvferry.wire.work import DecodeRequest, PrefillRequest

CLUSTER: Final = "dev"
RANDOM: Final = 0.1  # share of payloads that were never valid
REPEATED: Final = 0.15  # share that was heard before, as it was
MAX_HEARD: Final = 60


class Forger:
    """Publishes what nobody should."""

    def __init__(self, batch: Batch, cluster: ApiCluster) -> None:
        self.bus = cluster.bus("forger", "gateway")
        self._batch = batch
        self._cluster = cluster
        self._heard: dict[str, deque[bytes]] = {}  # subject -> payloads
        self._ids = Ids()
        self._messages = Messages(batch.chance, self._ids)
        self._codecs = Codecs()
        api, workers = cluster.api.fleet, cluster.workers
        self._ids.note("incarnation", api.incarnation, *(worker.incarnation for worker in workers))
        self._ids.note("worker_incarnation", *(worker.incarnation for worker in workers))
        self._ids.note("gateway_incarnation", api.incarnation)
        mailboxes = [api.mail_from(role) for role in WORKER_ROLES]
        self._ids.note("gateway", *mailboxes)
        self._ids.note("model", "memory")
        self._ids.note("token", *range(1, 257))
        self._ids.note("index", *range(8))
        self._ids.note("max_tokens", 1, 9, 40)
        targets: list[tuple[str, Codec[Any], Any]] = [
            *((worker.subject, self._codecs.to_worker, ToWorker) for worker in workers),
            *((mailbox, self._codecs.to_gateway, ToGateway) for mailbox in mailboxes),
            (beat_subject(CLUSTER, "gateway", "gateway-0", api.incarnation), self._codecs.beat, Beat),
            *(
                (beat_subject(CLUSTER, worker.role, worker.settings.name, worker.incarnation), self._codecs.beat, Beat)
                for worker in workers
            ),
            *(
                (exit_subject(CLUSTER, worker.role, worker.settings.name, worker.incarnation), self._codecs.beat, Beat)
                for worker in workers
            ),
            *(
                (cache_subject(CLUSTER, worker.role, worker.settings.name, worker.incarnation), self._codecs.cache,
                 CacheNews)
                for worker in workers
            ),
            ("", self._codecs.answer, Answer),  # to an inbox that was heard of
        ]  # fmt: skip
        self._targets = targets

    async def open(self) -> None:
        await self.bus.start()
        await self.bus.subscribe(f"kvferry.{CLUSTER}.>", self._on_message)

    async def case(self) -> None:
        """One payload, and the time for what it does to show."""
        chance = self._batch.chance
        subject, codec, union = chance.choice(self._targets)
        if not subject:
            inboxes = [heard for heard in self._heard if ".inbox." in heard]
            if not inboxes:
                return
            subject = chance.choice(inboxes)
        payload, mutated = self._payload(subject, codec, union)
        with self._batch.trying((subject, payload)):
            if chance.random() < 0.1:
                asked = asyncio.get_running_loop().create_task(self._request(subject, payload))
                await asked
            else:
                await self.bus.publish(subject, payload)
            await asyncio.sleep(chance.choice((0.0, 0.001, 0.01, 0.1)))
            self._check()
        try:
            codec.decode(payload)
        except WireError:
            self._batch.count(mutated=mutated, valid=False)
        else:
            self._batch.count(mutated=mutated, valid=True)

    async def _request(self, subject: str, payload: bytes) -> None:
        try:
            await self.bus.request(subject, payload, 0.05)
        except BusError:
            return

    def _payload(self, subject: str, codec: Codec[Any], union: Any) -> tuple[bytes, bool]:
        """A payload, and whether it is a changed valid one."""
        chance = self._batch.chance
        if chance.random() < RANDOM:
            return chance.randbytes(chance.randrange(60)), False
        heard = self._heard.get(subject)
        if heard and chance.random() < 0.5:
            payload = chance.choice(heard)
        else:
            payload = codec.encode(self._messages.any_of(union))
        kind = chance.random()
        if kind < REPEATED:
            return payload, True
        if kind < 0.55:
            return self._bent(payload), True
        if kind < 0.8:
            return spoiled(chance, payload), True
        return codec.encode(self._messages.any_of(union)), True

    def _bent(self, payload: bytes) -> bytes:
        """One value in the message's tree becomes another."""
        chance = self._batch.chance
        try:
            tree = msgspec.msgpack.decode(payload[1:])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return payload
        changed = _changed(self._other, tree, chance.randrange(1, 30))
        try:
            return payload[:1] + msgspec.msgpack.encode(changed)
        except (OverflowError, UnicodeEncodeError):
            return payload

    def _other(self, value: Any) -> Any:
        chance = self._batch.chance
        match value:
            case bool():
                return not value
            case int():
                return chance.choice((value + 1, max(0, value - 1), 0, 1 << 31, (1 << 32) - 1, (1 << 63) - 1))
            case float():
                return chance.choice((0.0, -value, value * 1000, 1e308, float("inf"), float("nan")))
            case str():
                return chance.choice((*junk.STRINGS[:6], value[:-1]))
            case bytes():
                return spoiled(chance, value) if value else b"\0\0\0\0"
            case None:
                return 0
            case _:
                return value

    def _check(self) -> None:
        """Nothing has broken."""
        cluster = self._cluster
        buses = [cluster.bus_of_gateway, *(worker.bus for worker in cluster.workers)]
        assert not sum(bus.counters.handler_errors for bus in buses), "a handler of bus messages failed"
        assert not any(worker.state == "wedged" for worker in cluster.workers), "a worker is wedged"
        assert not cluster.api.fleet.failed.is_set(), "the gateway has failed"
        for worker in cluster.workers:
            worker.check_integrity()

    def _on_message(self, message: BusMessage) -> None:
        """Learn what lives."""
        self._heard.setdefault(message.subject, deque(maxlen=MAX_HEARD)).append(message.payload)
        while len(self._heard) > 4 * MAX_HEARD:
            del self._heard[next(iter(self._heard))]
        decoders: list[Callable[[bytes], Any]] = [self._codecs.to_worker.decode, self._codecs.beat.decode]
        for decode in decoders:
            try:
                heard = decode(message.payload)
            except WireError:
                continue
            match heard:
                case PrefillRequest(work) | DecodeRequest(work):
                    self._ids.note("ticket", work.ticket)
                    self._ids.note("attempt", work.attempt)
                    self._ids.note("stream_id", work.stream_id)
                    self._ids.note("unit", work.unit)
                    self._ids.note("token", *unpack_tokens(work.prompt[: len(work.prompt) // 4 * 4]).tolist()[:2])
                case Heartbeat(record=record):
                    self._ids.note("kv_format_id", record.kv_format_id)
                    self._ids.note("subject", record.subject)
                    self._ids.note("shards", record.address.shards)
            return


def _changed(change: Callable[[Any], Any], tree: Any, steps: int) -> Any:
    """The tree with its `steps`-th leaf changed, counted around."""
    leaves: list[tuple[int | str, ...]] = []

    def walk(node: Any, path: tuple[int | str, ...]) -> None:
        if isinstance(node, list):
            for place, item in enumerate(node):
                walk(item, (*path, place))
        elif isinstance(node, dict):
            for key, item in node.items():
                walk(item, (*path, key))
        else:
            leaves.append(path)

    walk(tree, ())
    if not leaves:
        return tree
    return _replaced(change, tree, leaves[steps % len(leaves)])


def _replaced(change: Callable[[Any], Any], node: Any, path: tuple[int | str, ...]) -> Any:
    if not path:
        return change(node)
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = _replaced(change, node[path[0]], path[1:])  # type: ignore[call-overload, index]
    return copy
