"""The handshake that opens every data-plane connection, the same for all backends.

    initiator                       acceptor
    Hello(incarnation, nonce)  ->
                               <-   Hello(incarnation, nonce)
    Prove(proof)               ->
                               <-   Prove(proof)

Both sides speak at once: each sends its Hello when the connection opens and its Prove as soon as it has
the other's Hello. A proof is HMAC-SHA256 with the cluster's data key over what the connection is for, the prover's
side, both nonces and both incarnations: it cannot be reflected (the side), replayed (the nonces), moved to another
process (the incarnations) or to another port (the purpose).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final, Literal

from kvferry.errors import HandshakeRefused, WireError
from kvferry.wire.flow import FlowCodec, Hello, Prove

Side = Literal["initiator", "acceptor"]
NONCE_BYTES: Final = 16
DATA_PLANE: Final = b"kvferry data plane"
_INCARNATIONS: Final = struct.Struct("<QQ")


class Handshake:
    """One side of one handshake. Pure: messages in, messages out."""

    def __init__(
        self, side: Side, data_key: bytes, incarnation: int, nonce: bytes, purpose: bytes = DATA_PLANE
    ) -> None:
        self._side: Side = side
        self._purpose = purpose
        self._key = data_key
        self._codec = FlowCodec()
        self._mine = Hello(incarnation, nonce)
        self._theirs: Hello | None = None
        self._proven = False

    @property
    def done(self) -> bool:
        """The peer has proved that it holds the data key."""
        return self._proven

    @property
    def peer_incarnation(self) -> int:
        """From the peer's hello. Valid once `done`."""
        assert self._theirs is not None
        return self._theirs.incarnation

    def opening(self) -> bytes:
        """What to send first."""
        return self._codec.encode(self._mine)

    def feed(self, message: memoryview) -> bytes | None:
        """Take the peer's next message and return the answer to it, if it has one.

        Raises `HandshakeRefused` for another version, garbage, a message out of turn or a wrong proof.
        """
        try:
            flow = self._codec.decode(message)
        except WireError as error:
            raise HandshakeRefused(str(error)) from None
        if isinstance(flow, Hello) and self._theirs is None:
            self._theirs = flow
            return self._codec.encode(Prove(self._proof(self._side)))
        if isinstance(flow, Prove) and self._theirs is not None and not self._proven:
            if not hmac.compare_digest(flow.proof, self._proof(_other(self._side))):
                raise HandshakeRefused("the peer does not hold the cluster's data key")
            self._proven = True
            return None
        raise HandshakeRefused(f"{type(flow).__name__} out of turn")

    def _proof(self, prover: Side) -> bytes:
        assert self._theirs is not None
        first, second = (self._mine, self._theirs) if self._side == "initiator" else (self._theirs, self._mine)
        text = b"|".join(
            (
                self._purpose,
                prover.encode(),
                first.nonce + second.nonce + _INCARNATIONS.pack(first.incarnation, second.incarnation),
            )
        )
        return hmac.digest(self._key, text, hashlib.sha256)


def _other(side: Side) -> Side:
    return "acceptor" if side == "initiator" else "initiator"
