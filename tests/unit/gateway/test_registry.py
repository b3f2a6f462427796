"""The registry, keys, origins and figures: pure, or a file away from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvferry.bus.liveness import SILENCE, Seen
from kvferry.errors import SettingError
from kvferry.wire.beats import Heartbeat, Load, WorkerState
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry_gateway.fleet.registry import Registry
from kvferry_gateway.http.auth import MAX_KEYS, ApiKeys
from kvferry_gateway.http.cors import Cors
from kvferry_gateway.metrics import GatewayMetrics, HotHistogram
from kvferry_gateway.settings import GatewaySettings

SERVED = {"m": "words"}


def beat(
    number: int, incarnation: int = 5, role: str = "decode", state: WorkerState = "ready", waiting: int = 0
) -> Heartbeat:
    record = WorkerRecord(
        role, "w", incarnation, 1, "s", "m", "tcp", WorkerAddress(incarnation, ("a",)), "f", "n", 500, 16, 20, 1
    )  # type: ignore[arg-type]
    return Heartbeat(number, state, record, Load(num_waiting=waiting))


def waiting(registry: Registry) -> int:
    (row,) = registry.rows(0.0)
    number: int = row["load"]["num_waiting"]
    return number


def test_an_overtaken_or_doubled_heartbeat_changes_nothing() -> None:
    registry = Registry(0.0, SERVED)
    assert registry.observe(beat(7, waiting=1), 0.0) is Seen.NEW
    assert registry.observe(beat(6, waiting=9), 0.1) is None
    assert registry.observe(beat(7, waiting=9), 0.1) is None
    assert waiting(registry) == 1
    assert registry.observe(beat(8, waiting=2), 0.2) is Seen.ALIVE
    assert waiting(registry) == 2


def test_a_beat_number_may_wrap_around() -> None:
    registry = Registry(0.0, SERVED)
    registry.observe(beat((1 << 32) - 1), 0.0)
    assert registry.observe(beat(0), 0.1) is Seen.ALIVE


def test_how_long_a_model_has_been_without_a_decode_worker_is_told_by_their_heartbeats_while_the_bus_is_up() -> None:
    registry = Registry(0.0, SERVED)
    assert registry.absent_for("m", 9.0) == math.inf
    registry.observe(beat(1, 4, role="prefill"), 0.0)
    registry.observe(beat(1, state="loading"), 0.0)
    assert registry.absent_for("m", 9.0) == math.inf
    registry.observe(beat(2), 1.0)
    registry.observe(beat(2), 2.0)
    assert registry.absent_for("m", 9.0) == 8.0
    assert registry.absent_for("other", 9.0) == math.inf
    registry.liveness.bus_down(3.0)
    registry.bus_up(20.0)
    assert registry.absent_for("m", 21.0) == 1.0
    registry.observe(beat(3, state="draining"), 22.0)
    registry.bus_up(30.0)
    registry.remove(5)
    assert registry.absent_for("m", 32.0) == 12.0


def test_a_gateway_is_no_worker() -> None:
    registry = Registry(0.0, SERVED)
    assert registry.observe(beat(1, role="gateway"), 0.0) is None
    assert len(registry) == 0


def test_a_worker_that_was_gone_is_known_when_it_returns() -> None:
    registry = Registry(0.0, SERVED)
    now = 0.0
    registry.observe(beat(1), now)
    while not (gone := registry.liveness.verdicts(now)):
        now += 0.25
        registry.liveness.tick(now)
        assert now < SILENCE + 1
    assert gone == (5,)
    record = registry.remove(5)
    assert record is not None
    assert len(registry) == 0
    assert registry.observe(beat(2), now) is Seen.RETURNED
    assert registry.state_of(5) == "ready"


def test_the_cause_of_an_end_is_what_the_supervisor_says() -> None:
    registry = Registry(0.0, SERVED)
    registry.observe(beat(1), 0.0)
    assert registry.exited(5, "crashed", 0.1), "it is to be pinged"
    assert registry.has_crashed(5)
    registry.observe(beat(1, incarnation=6), 0.0)
    registry.exited(6, "killed", 0.1)
    assert not registry.has_crashed(6)
    assert not registry.exited(7, "crashed", 0.1), "nobody has heard of it"


def test_the_longest_request_is_what_the_largest_decode_worker_holds() -> None:
    registry = Registry(0.0, SERVED)
    assert registry.max_model_len("m") is None
    registry.observe(beat(1, role="prefill"), 0.0)
    assert registry.max_model_len("m") is None
    assert not registry.has_pair("m")
    registry.observe(beat(1, incarnation=6), 0.0)
    assert registry.max_model_len("m") == 320, "its pool is smaller than its context"
    assert registry.has_pair("m")
    registry.observe(beat(2, incarnation=6, state="draining"), 0.1)
    assert not registry.has_pair("m")


@pytest.mark.parametrize("content", ["", "\n# nothing\n", "k\n" * (MAX_KEYS + 1), None])
def test_a_key_file_without_a_usable_key_stops_the_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingError) as refused:
        ApiKeys(path)
    assert refused.value.setting == "--api-key-file"


def test_keys_are_not_kept_in_the_clear(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("secret-key-1\n")
    keys = ApiKeys(path)
    assert "secret-key-1" not in repr(vars(keys))
    assert keys.find(b"Bearer secret-key-1") is keys.find(b"bearer  secret-key-1") is not None
    for bad in (b"", b"Bearer", b"Bearer ", b"secret-key-1", b"Bearer secret-key-2", b"Bearer \xff"):
        assert keys.find(bad) is None


def test_no_origin_is_allowed_unless_it_is_named() -> None:
    assert Cors(()).headers(b"https://a") == []
    assert Cors(("https://a",)).headers(None) == []
    assert (b"access-control-allow-origin", b"*") in Cors(("*",)).headers(b"https://a")
    assert (b"access-control-allow-origin", b"https://a") not in Cors(("https://b",)).headers(b"https://a")
    assert Cors(("https://b",)).preflight(b"https://a", "POST", None) == [(b"vary", b"origin")]


def test_the_hot_histogram_counts_as_prometheus_does() -> None:
    metrics = GatewayMetrics()
    reference = metrics.histogram("kvferry_reference_seconds", "x", ("model",), buckets=(0.1, 0.2))
    hot = HotHistogram("kvferry_hot_seconds", "x", (0.1, 0.2))
    metrics.registry.register(hot)
    for model, values in {"m": (0.05, 0.1, 0.15, 0.2, 7.0), "n": (0.05,)}.items():
        hot.begin(model)
        for value in values:
            hot.observe(model, value)
            reference.labels(model).observe(value)
    for model in ("m", "n"):
        for sample in ("count", "sum"):
            expected = metrics.value(f"kvferry_reference_seconds_{sample}", model=model)
            assert metrics.value(f"kvferry_hot_seconds_{sample}", model=model) == expected > 0
        for bound in ("0.1", "0.2", "+Inf"):
            expected = metrics.value("kvferry_reference_seconds_bucket", model=model, le=bound)
            assert metrics.value("kvferry_hot_seconds_bucket", model=model, le=bound) == expected > 0
    assert metrics.value("kvferry_hot_seconds_count") == 6


def test_the_settings_of_the_design_are_the_defaults() -> None:
    settings = GatewaySettings()
    assert (settings.accept_timeout, settings.replace_wait, settings.failure_budget) == (0.3, 60.0, 3)
    assert (settings.sse_comment_interval, settings.port, settings.name) == (15.0, 8000, "gateway")
