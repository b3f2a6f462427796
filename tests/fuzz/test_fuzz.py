"""The short form of `make fuzz`, and that it sees what it is there to see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from fuzz.campaign import LEAST_VALID, Batch, Finding, campaign, run_batch
from fuzz.planes import PLANES

import kvferry.worker.handoff.incoming
from kvferry.errors import HandshakeRefused
from kvferry.transport.hello import Handshake
from kvferry.wire.frame import check
from kvferry.worker.handoff.landing import Landing
from kvferry.worker.inbox import Inbox
from kvferry_gateway.admission import Admission
from kvferry_gateway.answers.chat_answer import ChatAnswer
from kvferry_gateway.app import GatewayApp
from kvferry_gateway.body import parse
from kvferry_gateway.completions import Asked
from kvferry_gateway.requests.openai import ChatRequest

NUM_CASES = 5_000
SEED = 20
TOTAL_WEIGHT = sum(plane.weight for plane in PLANES.values())


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """Each piece of garbage is a line of the log."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("name", PLANES)
def test_nothing_that_is_sent_crashes_hangs_or_stays(name: str, record_property: Any) -> None:
    plane = PLANES[name]
    tally = campaign(name, plane.run, SEED, NUM_CASES * plane.weight // TOTAL_WEIGHT, size=100)
    record_property("inputs", tally.num_cases)
    record_property("share_valid", tally.share_valid)
    assert tally.num_cases >= NUM_CASES * plane.weight // TOTAL_WEIGHT
    assert tally.share_valid >= LEAST_VALID


def test_a_batch_that_runs_again_sends_the_same() -> None:
    def answers() -> list[Any]:
        batch = Batch("http", SEED, 3, 30)
        PLANES["http"].run(batch)
        return [batch.last, batch.num_mutated, batch.num_valid]

    assert answers() == answers()


# -- what is planted is found, and named with the command that repeats it -------------------------------------------


def found(name: str, size: int = 100) -> str:
    with pytest.raises(Finding) as caught:
        run_batch(PLANES[name].run, Batch(name, SEED, 0, size))
    text = str(caught.value)
    assert f'make fuzz ARGS="--plane {name} --seed {SEED} --batch 0 --size {size}"' in text
    assert "the last input: " in text
    return text


def test_a_gateway_that_answers_500_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: GatewayApp, exchange: Any) -> None:
        body = await self._body(exchange)
        if b"user" in body:
            raise KeyError("user")
        await self._completions.serve("chat", lambda: Asked(parse(ChatRequest, body), ChatAnswer), exchange)

    monkeypatch.setattr(GatewayApp, "_chat", broken)
    assert "500 " in found("http")


def test_a_request_that_is_never_let_go_of_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "release", lambda self, model, count: None)
    assert "not within" in found("http")


def test_an_input_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any) -> None:
        while True:
            pass

    monkeypatch.setattr("fuzz.campaign.CPU_SECONDS", 0.2)
    monkeypatch.setattr(Admission, "release", endless)
    assert "Hang" in found("http")


def test_a_handler_of_bus_messages_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Inbox._on_message

    def broken(self: Inbox, message: Any) -> None:
        assert len(message.payload) > 20, "too short for anything"
        right(self, message)

    monkeypatch.setattr(Inbox, "_on_message", broken)
    assert "a handler of bus messages failed" in found("bus", 400)


def test_a_checksum_that_nobody_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.wire.frame._checksum", lambda slot, end: 0)
    monkeypatch.setattr(kvferry.worker.handoff.incoming, "check", check)
    assert "a damaged frame was taken" in found("frames")


def test_a_proof_that_nobody_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Handshake.feed

    def broken(self: Handshake, message: memoryview) -> bytes | None:
        try:
            return right(self, message)
        except HandshakeRefused:
            self._proven = self._theirs is not None
            return None

    monkeypatch.setattr(Handshake, "feed", broken)
    assert "was taken" in found("hello") or "was let in" in found("hello")


def test_a_staging_slot_that_is_not_given_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Landing, "_release", lambda self, slots: None)
    found("flow")
