"""Who may pair with whom, and what a unit is bound to."""

from __future__ import annotations

from typing import Any

from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry_gateway.placement.pairing import Partners, capacity_of, numerics_of


def record(role: str, **more: Any) -> WorkerRecord:
    fields: dict[str, Any] = {
        "role": role, "name": role, "incarnation": 1, "pid": 1, "subject": "s", "model": "m", "transport": "tcp",
        "address": WorkerAddress(1, ("a",)), "kv_format_id": "f", "numerics_id": "a", "max_model_len": 1000,
        "block_size": 10, "num_blocks": 50, "kv_token_bytes": 1,
    }  # fmt: skip
    return WorkerRecord(**(fields | more))


def test_only_an_exact_decode_worker_binds() -> None:
    assert numerics_of(record("decode", exact=True)) == "a"
    assert numerics_of(record("decode")) is None


def test_an_exact_decode_worker_takes_kv_of_exact_workers_of_its_numerics_alone() -> None:
    partners = Partners.of(record("decode", exact=True))
    assert partners.include(record("prefill", exact=True))
    assert not partners.include(record("prefill")), "a name alone promises nothing"
    assert not partners.include(record("prefill", exact=True, numerics_id="b"))


def test_a_fast_decode_worker_takes_any_kv_of_its_model_and_format() -> None:
    partners = Partners.of(record("decode"))
    assert partners.include(record("prefill", exact=True, numerics_id="b"))
    assert not partners.include(record("prefill", kv_format_id="g"))
    assert not partners.include(record("prefill", model="x"))


def test_a_worker_holds_what_its_pool_and_its_context_both_allow() -> None:
    assert capacity_of(record("decode")) == 500
    assert capacity_of(record("decode", max_model_len=300)) == 300
