"""What a gateway shows before anything has happened: alerts and panels take a first event for one only from 0 on."""

from __future__ import annotations

from typing import get_args

from kvferry.wire.work import RejectReason
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.streams.attempt import HARMLESS_ENDS


def shown(name: str, label: str) -> dict[str, float]:
    """Of a gateway that has just begun: the values of that label, and those of the counter."""
    families = GatewayMetrics(["m"]).registry.collect()
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    assert {sample.labels["model"] for sample in samples} == {"m"}
    return {sample.labels[label]: sample.value for sample in samples}


def test_reasons_are_shown_from_zero_on() -> None:
    lost = shown("kvferry_replacement_total", "reason")
    assert {"wedged", "decode_gone", "error", *HARMLESS_ENDS} <= lost.keys()
    assert not {"stop", "length"} & lost.keys(), "these are no losses"
    refused = shown("kvferry_refusal_total", "reason")
    assert {"unreachable", *get_args(RejectReason)} == refused.keys()
    placed = shown("kvferry_placement_total", "kind")
    assert set((lost | refused | placed).values()) == {0}


def test_so_are_the_outcomes_that_alerts_ask_for() -> None:
    assert shown("kvferry_request_total", "outcome") == {"no_worker": 0, "rate_limit_exceeded": 0}
    assert shown("kvferry_request_total", "route").keys() == {"chat", "text", "responses"}
