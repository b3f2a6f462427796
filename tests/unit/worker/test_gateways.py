"""Which gateways live and what they still want."""

from __future__ import annotations

from sequences import GATEWAY, work_of

from kvferry.bus.liveness import BEAT_INTERVAL, SILENCE, Liveness
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.worker.gateways import Gateways

ME = 9


def beat(number: int, *streams: int, worker: int = ME) -> GatewayHeartbeat:
    return GatewayHeartbeat(number, "g", GATEWAY, "subject", 1, ((worker, streams),))


def test_a_stream_missing_from_two_heartbeats_in_a_row_is_unwanted() -> None:
    gateways = Gateways(ME, Liveness(0.0))
    wanted, unwanted, flaky = work_of(4), work_of(4), work_of(4)
    works = [wanted, unwanted, flaky]
    assert gateways.observe(beat(1, wanted.stream_id), works, 0.0) == []
    assert gateways.observe(beat(2, wanted.stream_id, flaky.stream_id), works, 0.2) == [unwanted]
    assert gateways.observe(beat(3, wanted.stream_id), [wanted, flaky], 0.4) == []


def test_a_heartbeat_that_comes_twice_or_late_counts_once() -> None:
    gateways = Gateways(ME, Liveness(0.0))
    work = work_of(4)
    for number in (5, 5, 4, 5):
        assert gateways.observe(beat(number), [work], 0.0) == []
    assert gateways.observe(beat(6), [work], 0.0) == [work]


def test_streams_listed_for_another_worker_do_not_count_here() -> None:
    gateways = Gateways(ME, Liveness(0.0))
    work = work_of(4)
    for number in (1, 2):
        unwanted = gateways.observe(beat(number, work.stream_id, worker=ME + 1), [work], 0.0)
    assert unwanted == [work]


def test_a_silent_gateway_is_gone_once_and_one_that_only_asked_counts_too() -> None:
    gateways = Gateways(ME, Liveness(0.0))
    gateways.seen(5, 0.0)
    gateways.observe(beat(1), [], 0.0)
    now = 0.0
    gone: list[int] = []
    while now < 3 * SILENCE:
        now += BEAT_INTERVAL
        gateways.liveness.tick(now)
        gone += gateways.gone(now)
        assert not gone or now > SILENCE
    assert sorted(gone) == [5, GATEWAY]
    assert len(gateways) == 0
