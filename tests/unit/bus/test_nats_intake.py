"""Messages that pass nats-py by, against nats-py's own parser: the same ones in the same order, however cut."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from nats.protocol.parser import Parser

from kvferry.bus.nats_intake import Intake

TAPPED, UNTAPPED = 7, 8
Told = tuple[int, str, bytes, str]


class Client:
    """What nats-py's parser tells of, in place of its client."""

    def __init__(self, told: list[Told]) -> None:
        self._told = told
        self.pings = 0

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self._told.append((sid, subject.decode(), data, reply.decode()))

    async def _process_ping(self) -> None:
        self.pings += 1
        await asyncio.sleep(0)  # what comes meanwhile must wait its turn, or may not


def _message(sid: int, subject: str, reply: str, payload: bytes) -> bytes:
    middle = f"{reply} " if reply else ""
    return f"MSG {subject} {sid} {middle}{len(payload)}\r\n".encode() + payload + b"\r\n"


def _with_headers(sid: int, payload: bytes) -> bytes:
    head = b"NATS/1.0 503\r\n\r\n"
    return f"HMSG a.b {sid} {len(head)} {len(head) + len(payload)}\r\n".encode() + head + payload + b"\r\n"


payloads = st.one_of(st.binary(max_size=40), st.sampled_from([b"MSG a 7 3\r\nabc\r\n", b"\r\n", b"PING\r\n"]))
operations = st.one_of(
    st.builds(
        _message,
        st.sampled_from([TAPPED, UNTAPPED]),
        st.sampled_from(["a", "kv.x-1.y"]),
        st.sampled_from(["", "inbox.3"]),
        payloads,
    ),
    st.builds(_with_headers, st.just(TAPPED), payloads),
    st.sampled_from([b"PING\r\n", b"+OK\r\n"]),
)


async def _heard(data: bytes, cuts: list[int], pauses: list[bool]) -> tuple[list[Told], int]:
    """What comes of `data`, cut there, through an intake before nats-py's reader and parser; and its pings."""
    told: list[Told] = []
    passed = 0

    def tap(subject: str, payload: bytes, reply: str, headers: object) -> None:
        nonlocal passed
        passed += 1
        told.append((TAPPED, subject, payload, reply))

    client = Client(told)
    parser, reader = Parser(client), asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)

    async def read() -> None:
        while received := await reader.read(1 << 16):
            await parser.parse(received)

    reading = asyncio.create_task(read())
    intake = Intake(protocol, lambda: not reader._buffer and not parser.buf, {TAPPED: tap})  # type: ignore[attr-defined]
    for (begin, end), pause in zip(pairwise([0, *cuts, len(data)]), pauses, strict=True):
        intake.data_received(data[begin:end])
        if pause:
            await asyncio.sleep(0)
    reader.feed_eof()
    await reading
    assert not parser.buf
    return told, client.pings


@given(st.lists(operations, max_size=8), st.data())
def test_no_message_is_lost_doubled_or_overtaken(sent: list[bytes], draw: st.DataObject) -> None:
    data = b"".join(sent)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pauses = draw.draw(st.lists(st.booleans(), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    expected: list[Told] = []
    client = Client(expected)
    asyncio.run(Parser(client).parse(data))
    assert asyncio.run(_heard(data, cuts, pauses)) == (expected, client.pings)


class Behind(asyncio.Protocol):
    def __init__(self) -> None:
        self.received: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.received.append(data)


def test_whole_messages_do_not_reach_nats_py() -> None:
    behind = Behind()
    passed: list[tuple[object, ...]] = []
    intake = Intake(behind, lambda: True, {TAPPED: lambda *message: passed.append(message)})
    intake.data_received(_message(TAPPED, "a", "", b"1") + _message(TAPPED, "b", "r", b"2") + b"PING\r\n")
    assert passed == [("a", b"1", "", None), ("b", b"2", "r", None)]
    assert behind.received == [b"PING\r\n"]


def test_a_subject_that_is_no_text_costs_nothing_else() -> None:
    passed: list[tuple[object, ...]] = []
    intake = Intake(Behind(), lambda: True, {TAPPED: lambda *message: passed.append(message)})
    intake.data_received(b"MSG a.\xff 7 1\r\n1\r\n" + _message(TAPPED, "b", "", b"2"))
    assert passed == [("a.\ufffd", b"1", "", None), ("b", b"2", "", None)]
