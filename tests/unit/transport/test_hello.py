"""The handshake as a pure exchange of messages."""

from __future__ import annotations

import pytest

from kvferry.errors import HandshakeRefused
from kvferry.transport.hello import Handshake, Side
from kvferry.wire.flow import Abort, FlowCodec, Hello, Prove

KEY = b"key"


def side(which: Side, *, key: bytes = KEY, incarnation: int = 1, nonce: int = 1) -> Handshake:
    return Handshake(which, key, incarnation, bytes([nonce]) * 16)


def feed(handshake: Handshake, message: bytes) -> bytes:
    answer = handshake.feed(memoryview(message))
    assert answer is not None
    return answer


def test_both_sides_prove_and_learn_the_incarnation() -> None:
    one, other = side("initiator", incarnation=1), side("acceptor", incarnation=(1 << 64) - 1, nonce=2)
    proof_of_one, proof_of_other = feed(one, other.opening()), feed(other, one.opening())
    assert not one.done
    assert not other.done
    assert one.feed(memoryview(proof_of_other)) is None
    assert other.feed(memoryview(proof_of_one)) is None
    assert one.done
    assert other.done
    assert one.peer_incarnation == (1 << 64) - 1
    assert other.peer_incarnation == 1


def test_another_key_is_refused_by_both() -> None:
    one, other = side("initiator"), side("acceptor", key=b"another", nonce=2)
    proofs = feed(one, other.opening()), feed(other, one.opening())
    for handshake, proof in zip((other, one), proofs, strict=True):
        with pytest.raises(HandshakeRefused):
            handshake.feed(memoryview(proof))
        assert not handshake.done


def test_a_proof_sent_back_to_its_prover_proves_nothing() -> None:
    victim = side("acceptor")
    opening = victim.opening()
    reflected = feed(victim, opening)
    with pytest.raises(HandshakeRefused):
        victim.feed(memoryview(reflected))


@pytest.mark.parametrize("changed", [{"nonce": 3}, {"incarnation": 7}])
def test_a_proof_of_another_handshake_proves_nothing(changed: dict[str, int]) -> None:
    one, other = side("initiator"), side("acceptor", nonce=2)
    recorded = feed(one, other.opening())
    later = side("acceptor", **{"nonce": 2, **changed})
    feed(later, one.opening())
    with pytest.raises(HandshakeRefused):
        later.feed(memoryview(recorded))


def test_any_flipped_bit_is_refused() -> None:
    one, other = side("initiator"), side("acceptor", nonce=2)
    proof = feed(one, other.opening())
    feed(other, one.opening())
    for position in range(len(proof)):
        spoilt = bytearray(proof)
        spoilt[position] ^= 1
        with pytest.raises(HandshakeRefused):
            other.feed(memoryview(spoilt))
    other.feed(memoryview(proof))
    assert other.done


def test_garbage_another_version_and_messages_out_of_turn_are_refused() -> None:
    codec = FlowCodec()
    hello, proof = codec.encode(Hello(2, bytes(16))), codec.encode(Prove(bytes(32)))
    for first in (b"", b"\x00", b"GET / HTTP/1.1", b"\xff" + hello[1:], proof, codec.encode(Abort(1))):
        with pytest.raises(HandshakeRefused):
            side("acceptor").feed(memoryview(first))
    handshake = side("acceptor")
    feed(handshake, hello)
    with pytest.raises(HandshakeRefused):
        handshake.feed(memoryview(hello))


def test_nothing_is_taken_after_the_proof() -> None:
    one, other = side("initiator"), side("acceptor", nonce=2)
    proof = feed(one, other.opening())
    feed(other, one.opening())
    other.feed(memoryview(proof))
    with pytest.raises(HandshakeRefused):
        other.feed(memoryview(proof))
