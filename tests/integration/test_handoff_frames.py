"""KV frames that come corrupt, short, long or never; tickets that are wrong, late or replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from cluster import DATA_KEY, GREEDY, Cluster, all_free, expected, prompt_of, settled, virtual

from kvferry.transport.base import Connection, TransportSettings
from kvferry.transport.memory import MemoryTransport
from kvferry.wire.flow import Aborted, Ack, Credit, Fetch, Flow, FlowCodec, Open, Progress, Unknown
from kvferry.wire.frame import frame_tag
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import DecodeRequest, PrefillRequest
from kvferry.worker.report import address, load
from kvferry_prefill.worker import PrefillWorker


def flip(frame: bytearray) -> None:
    frame[-1] ^= 1


def flip_header(frame: bytearray) -> None:
    frame[1] ^= 0xFF


def shorten(frame: bytearray) -> None:
    del frame[-3:]


def lengthen(frame: bytearray) -> None:
    frame += b"\0" * 3


def overflow(frame: bytearray) -> None:
    frame += bytes(1 << 20)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [(flip, "checksum"), (flip_header, "header"), (shorten, "short"), (lengthen, "long"), (overflow, "long")],
)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_bad_frame_is_asked_for_again_alone(spoil: Callable[[bytearray], None], kind: str, place: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(max_num_batched_tokens=64), await cluster.decode()
        gateway = await cluster.gateway()
        for _ in range(place):
            cluster.network.spoil_next_frame(lambda frame: None)
        cluster.network.spoil_next_frame(spoil)
        prompt = prompt_of(320)
        work = await gateway.run(prompt, decode, prefill)
        assert gateway.text(work) == expected(prompt, GREEDY, 8)
        value = decode.metrics.value
        assert value("kvferry_transfer_failure_total", kind=kind) == 1
        assert value("kvferry_pull_total", outcome="received") == 1
        assert value("kvferry_kv_token_total", direction="received") == 320
        sent = prefill.metrics.value("kvferry_kv_token_total", direction="sent")
        assert 320 <= sent <= 320 + 64, "one piece at most was sent twice"

    virtual(scenario)


def test_a_whole_frame_of_another_workers_first_pull_is_refused_as_foreign() -> None:
    """Of as many tokens, for the same places, sealed by the same P (simulation, seed 1174)."""
    caught = bytearray()

    def swap(frame: bytearray) -> None:
        frame[:] = caught

    async def scenario(cluster: Cluster) -> None:
        prefill, first, second = await cluster.prefill(), await cluster.decode(), await cluster.decode("decode-1")
        gateway = await cluster.gateway()
        cluster.network.spoil_next_frame(caught.extend)
        await gateway.run(prompt_of(96), first, prefill)
        cluster.network.spoil_next_frame(swap)
        prompt = prompt_of(96)[::-1]
        work = await gateway.run(prompt, second, prefill)
        assert gateway.text(work) == expected(prompt, GREEDY, 8)
        assert second.metrics.value("kvferry_transfer_failure_total", kind="identity") == 1

    virtual(scenario)


def test_a_pull_whose_frames_are_all_bad_is_tried_once_more_and_then_given_up() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        for _ in range(40):
            cluster.network.spoil_next_frame(flip)
        work = gateway.work(prompt_of(100))  # one chunk: token 0 is out before a frame can fail
        await gateway.accepted(work, decode, prefill)
        end = await gateway.ended(work)
        assert end.reason == "transfer_failed"
        assert list(gateway.tokens[work.stream_id]) == [0], "token 0 came from P; D drew nothing"
        assert load(decode).steps == 0
        await gateway.cancel(work, prefill, decode)
        await settled(lambda: all_free(prefill, decode), within=0.2)
        assert decode.scheduler.memory.pool.num_cached == 0, "a failed pull publishes no block"

    virtual(scenario)


class Peer:
    """A data-plane client of P that says what a test tells it to say."""

    def __init__(self, cluster: Cluster, name: str = "peer") -> None:
        settings = TransportSettings(incarnation=4711, data_key=DATA_KEY)
        self._transport = MemoryTransport(settings, cluster.runtime, cluster.network, name)
        self._codec = FlowCodec()
        self.heard: list[Flow] = []

    async def connect(self, prefill: PrefillWorker) -> Connection:
        connection = await self._transport.connect(prefill.transport.address, 1.0)
        connection.on_message(lambda payload: self.heard.append(self._codec.decode(bytes(payload))))
        self.connection = connection
        return connection

    def say(self, message: Flow) -> None:
        self.connection.send_message(self._codec.encode(message))

    def post(self, pull_id: int, count: int) -> list[asyncio.Future[int]]:
        """Receives for the first frames of a pull."""
        frames = range(count)
        return [self.connection.receive(frame_tag(pull_id, frame), memoryview(bytearray(1 << 20))) for frame in frames]

    def answer(self, kind: type[Flow]) -> bool:
        return any(isinstance(message, kind) for message in self.heard)

    async def close(self) -> None:
        await self._transport.close()


def test_an_open_with_a_wrong_ticket_is_parked_and_then_gets_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill()
        peer = Peer(cluster)
        await peer.connect(prefill)
        peer.say(Open(1, b"w" * 16, 1))
        waited = await settled(lambda: peer.answer(Unknown), within=1.5)
        assert waited >= 1.0
        assert not peer.answer(Progress)
        await peer.close()

    virtual(scenario)


def test_an_open_that_comes_before_its_request_is_parked_and_then_served() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(100))
        gateway.expect(work, decode)
        gateway.expect(work, prefill)
        await gateway.ask(decode, DecodeRequest(work, address(prefill)))
        await settled(lambda: cluster_opens(prefill) == 1, within=0.5)
        await gateway.ask(prefill, PrefillRequest(work))
        await gateway.ended(work)
        assert gateway.text(work) == expected(prompt_of(100), GREEDY, 8)

    def cluster_opens(prefill: PrefillWorker) -> int:
        return len(prefill._sender._parked)

    virtual(scenario)


def test_a_ticket_replayed_after_its_acknowledgement_gets_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        work = await gateway.run(prompt_of(100), decode, prefill)
        peer = Peer(cluster)
        await peer.connect(prefill)
        peer.say(Open(1, work.ticket, work.attempt))
        await settled(lambda: peer.answer(Unknown), within=1.5)
        assert not peer.answer(Progress)
        await peer.close()

    virtual(scenario)


@pytest.mark.parametrize(
    "messages",
    [
        [Open(1, b"w" * 16, 1), Open(1, b"w" * 16, 1)],
        [Open(1, b"w" * 16, 1), Fetch(1, 0, 4)],
        [Open(1, b"w" * 16, 1), Ack(1)],
        [Open(1, b"w" * 16, 1), Credit(1, 4)],
        [Fetch(9, 0, 4), Credit(9, 4), Ack(9)],
        [Progress(1, True, 0, 0, 0.0)],
    ],
)
def test_a_peer_that_breaks_the_protocol_disturbs_nobody(messages: list[Flow]) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        peer = Peer(cluster)
        await peer.connect(prefill)
        for message in messages:
            peer.say(message)
        peer.connection.send_message(b"\x01garbage")
        work = await gateway.run(prompt_of(100), decode, prefill)
        assert gateway.text(work) == expected(prompt_of(100), GREEDY, 8)
        assert peer.connection.closed
        await peer.close()

    virtual(scenario)


@pytest.mark.parametrize("bad", [Fetch(1, 5, 4), Fetch(1, 4096, 4), Credit(1, 4, (7,)), Ack(1)])
def test_a_pull_that_asks_for_what_is_not_there_is_refused_and_its_kv_goes_back_to_its_lease(bad: Flow) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(lease_s=2.0)
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(100), sampling=Sampling(max_tokens=4))
        gateway.expect(work, prefill)
        await gateway.ask(prefill, PrefillRequest(work))
        peer = Peer(cluster)
        await peer.connect(prefill)
        peer.say(Open(1, work.ticket, work.attempt))
        await settled(lambda: peer.answer(Progress), within=0.5)
        posted = peer.post(1, 4) if isinstance(bad, Fetch) else []
        peer.say(bad)
        await settled(lambda: all(receive.done() for receive in posted), within=0.5)
        assert (await gateway.ended(work, limit=4.0)).reason == "expired"
        assert prefill.metrics.value("kvferry_wire_error_total", plane="data", kind="refused") == 1
        await peer.close()

    virtual(scenario)


@pytest.mark.parametrize("known", ["ended", "unknown"])
def test_what_is_fetched_of_a_pull_that_p_has_aborted_is_padded(known: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(lease_s=0.5)
        gateway = await cluster.gateway()
        ticket, attempt = b"w" * 16, 1
        if known == "ended":
            work = gateway.work(prompt_of(100), sampling=Sampling(max_tokens=4))
            ticket, attempt = work.ticket, work.attempt
            gateway.expect(work, prefill)
            await gateway.ask(prefill, PrefillRequest(work))
            assert (await gateway.ended(work, limit=2.0)).reason == "expired"
        peer = Peer(cluster)
        await peer.connect(prefill)
        posted = peer.post(1, 4)
        peer.say(Open(1, ticket, attempt))
        peer.say(Fetch(1, 0, 4))
        await settled(lambda: all(receive.done() for receive in posted), within=0.5)
        assert peer.heard == [Aborted(1, 0, "expired" if known == "ended" else "refused")]
        await peer.close()

    virtual(scenario)
