"""Versioned msgpack codec: `message -> bytes` and back into a closed union of frozen types.

A message on the wire is

    u8 version | msgpack array [tag, field, field, …]

Fields are positional. A newer sender of the same version may append fields, which an older receiver
ignores; a removed or retyped field is a new version. Decoding validates every type and limit
(`msgspec.Meta` on the fields) before it returns, and raises `UnknownVersion` or `MalformedMessage`.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

import msgspec

from kvferry.errors import MalformedMessage, UnknownVersion

WIRE_VERSION: Final = 1

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of every message: immutable, positional on the wire."""


class Codec(Generic[T]):
    """Encodes and decodes one closed union of messages.

    An instance keeps its own encoder and decoder, which are not shared between threads.
    """

    def __init__(self, union: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._prefix = bytes([WIRE_VERSION])

    def encode(self, message: T) -> bytes:
        return self._prefix + self._encoder.encode(message)

    def decode(self, payload: bytes | memoryview) -> T:
        """Raises `UnknownVersion`, or `MalformedMessage` for anything that is not in the union."""
        if len(payload) == 0:
            raise MalformedMessage("empty message")
        if payload[0] != WIRE_VERSION:
            raise UnknownVersion(payload[0])
        try:
            return self._decoder.decode(memoryview(payload)[1:])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            # The text of a validation error names the path of the field, never its content.
            raise MalformedMessage(str(error)) from None
