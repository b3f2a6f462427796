"""Clients that connect and say nothing, or say it one byte at a time: each gives its connection back in time.

Real sockets. `receive_timeout` is short here, and each test's bytes come far more often than it: only a bound on the
whole request, not on the pause between two bytes, ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from scripted_worker import Cluster, completion, tokens_of

pytestmark = pytest.mark.usefixtures("no_leaks")

RECEIVE_TIMEOUT_S = 0.4
PAUSE_S = 0.02
PATIENCE_S = 60.0  # many times what any of it takes
BODY = json.dumps(completion(stream=True, max_tokens=4)).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
async def cluster(no_leaks: None, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path, receive_timeout=RECEIVE_TIMEOUT_S, keep_alive_timeout=1) as cluster:
        yield cluster


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def rest(self) -> bytes:
        """All that comes until the gateway closes the connection."""
        pieces = []
        async with asyncio.timeout(PATIENCE_S):
            # Piece by piece: a reset that follows an answer takes nothing of it away.
            with contextlib.suppress(ConnectionResetError):
                while piece := await self.reader.read(1 << 16):
                    pieces.append(piece)
        return b"".join(pieces)

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(mark)

    async def trickle(self, text: bytes) -> None:
        """One byte at a time, for as long as the other side listens."""
        for byte in text:
            if self.reader.at_eof():
                return
            self.writer.write(bytes([byte]))
            await asyncio.sleep(PAUSE_S)


@asynccontextmanager
async def connected(cluster: Cluster) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.http.address[1])
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def answer_to_a_trickle(client: Client, text: bytes) -> bytes:
    """What comes back when `text` would take longer than any limit."""
    assert len(text) * PAUSE_S > 2 * RECEIVE_TIMEOUT_S
    writing = asyncio.create_task(client.trickle(text))
    try:
        return await client.rest()
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_a_connection_that_says_nothing_is_closed_without_a_word(cluster: Cluster) -> None:
    async with connected(cluster) as client:
        assert await client.rest() == b""


async def test_a_head_that_comes_byte_by_byte_is_408(cluster: Cluster) -> None:
    async with connected(cluster) as client:
        answer = await answer_to_a_trickle(client, b"GET /health HTTP/1.1\r\nhost: x\r\nx-endless: " + b"y" * 2000)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b'"code":"request_timeout"' in answer


async def test_a_body_that_comes_byte_by_byte_is_408_and_reaches_no_worker(cluster: Cluster) -> None:
    worker = await cluster.speaker("answer")
    async with connected(cluster) as client:
        client.writer.write(HEAD % 2000)
        answer = await answer_to_a_trickle(client, BODY + b" " * 2000)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert not worker.works


async def test_the_next_request_of_a_connection_has_the_same_time(cluster: Cluster) -> None:
    async with connected(cluster) as client:
        client.writer.write(HEALTH)
        assert (await client.until(b"}")).startswith(b"HTTP/1.1 200 ")
        answer = await answer_to_a_trickle(client, b"\r\n\r\n" + HEALTH[:-4] + b"\r\nx-endless: " + b"y" * 2000)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_who_has_its_answer_cannot_trickle_on_with_the_body(tmp_path: Path) -> None:
    small = Cluster(tmp_path, receive_timeout=RECEIVE_TIMEOUT_S, max_body_bytes=100)
    async with small as cluster, connected(cluster) as client:
        client.writer.write(HEAD % 2000)
        answer = await answer_to_a_trickle(client, b" " * 2000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"408" not in answer


async def test_a_connection_between_two_requests_is_closed_after_its_time(cluster: Cluster) -> None:
    async with connected(cluster) as client:
        client.writer.write(HEALTH)
        await client.until(b"}")
        assert await client.rest() == b""


async def test_an_answer_may_take_longer_than_its_request_and_the_connection_lives_on(cluster: Cluster) -> None:
    """The limit is on what comes in. Both requests are served on one connection, with more than it between them."""
    _, decode = await cluster.pair()
    async with connected(cluster) as client:
        for _ in range(2):
            client.writer.write(HEAD % len(BODY) + BODY)
            await decode.until(lambda: decode.works and decode.held)
            work = decode.works[-1]
            for index, token in enumerate(tokens_of("abcd")):
                await asyncio.sleep(RECEIVE_TIMEOUT_S / 2)  # 4 of them: twice the limit
                decode.publish(work, [(index, token)])
            decode.publish(work, end=("length", 4))
            answer = await client.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert answer.count(b"HTTP/1.1 200 OK") == 1
            decode.forget(work)
