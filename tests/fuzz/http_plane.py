"""HTTP bodies through ASGI into a real gateway, with a real prefill and decode worker behind it, on a virtual clock.

Whatever is sent: a status below 500, an error in OpenAI's form or a whole answer, and nothing left of it anywhere.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from api_cluster import ApiCluster
from cluster import check_clean, settled
from fuzz import junk
from fuzz.bending import harmful, harmless
from fuzz.bodies import ROUTES, Bodies
from fuzz.campaign import Batch, run_virtually

VIRTUAL_SECONDS: Final = 300.0  # of one request, whatever it asks
SETTLE_S: Final = 5.0  # virtual, until nothing is left of a request
RANDOM: Final = 0.1  # share of bodies that were never valid
HARMLESS: Final = 0.5  # of the changed ones
GONE: Final = 0.05  # share of clients that hang up
ERROR_FIELDS: Final = {"message", "type", "param", "code"}
REASONS: Final = ("stop", "length", "tool_calls")


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False


@dataclass(frozen=True)
class Sent:
    """One request as it is tried."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    pieces: tuple[bytes, ...]
    hangs_up_after: int | None  # pieces of the answer; None: reads all


def http_plane(batch: Batch) -> None:
    run_virtually(batch, _batch)


async def _batch(batch: Batch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster = ApiCluster()
        await cluster.open(Path(folder), disaggregated=True, max_body_bytes=1 << 17)
        for _ in range(batch.num_cases):
            await _case(batch, cluster)
        await cluster.stop()
        for worker in cluster.workers:
            check_clean(worker)


async def _case(batch: Batch, cluster: ApiCluster) -> None:
    chance = batch.chance
    sent, mutated = _request(batch)
    with batch.trying(sent):
        try:
            async with asyncio.timeout(VIRTUAL_SECONDS):
                answer = await exchange(cluster.api.app, sent)
        except TimeoutError:
            raise AssertionError(f"no end within {VIRTUAL_SECONDS:g} virtual seconds") from None
        valid = check_answer(sent, answer)
        completions, fleet = cluster.api.completions, cluster.api.fleet
        await settled(lambda: completions.num_live == 0 and not len(fleet.table) and not fleet.attached, SETTLE_S)
        assert [worker.state for worker in cluster.workers] == ["ready", "ready"]
        errors = sum(bus.counters.handler_errors for bus in (cluster.bus_of_gateway, *_buses(cluster)))
        assert not errors, "a handler of bus messages failed"
    batch.count(mutated=mutated, valid=valid)
    if chance.random() < 0.02:
        for worker in cluster.workers:
            worker.check_integrity()


def _buses(cluster: ApiCluster) -> list[Any]:
    return [worker.bus for worker in cluster.workers]


# -- what is sent --------------------------------------------------------------------------------------------------


def _request(batch: Batch) -> tuple[Sent, bool]:
    """A request, and whether its body is a changed valid one."""
    chance = batch.chance
    bodies = Bodies(chance)
    path = bodies.route()
    mutated = chance.random() >= RANDOM
    if mutated:
        change = harmless if chance.random() < HARMLESS else harmful
        body = change(chance, bodies, path, bodies.valid(path))
    elif chance.random() < 0.5:
        body = chance.randbytes(chance.randrange(200))
    else:
        body = json.dumps(junk.value(chance, 4)).encode()
    method, headers = "POST", [(b"content-length", str(len(body)).encode())]
    if chance.random() < 0.05:  # the rest of a request may be odd, too
        mutated = False
        method = chance.choice(("GET", "PUT", "HEAD", "OPTIONS", "POST", "BREW"))
        path = chance.choice((path, path + "/", "/v1/models/" + junk.STRINGS[4], "/" + chance.randbytes(4).hex()))
        headers += [
            (chance.choice((b"x-request-id", b"authorization", b"origin", b"content-length")), chance.randbytes(9))
        ]
    pieces = _cut(batch, body)
    hangs_up = chance.randrange(4) if chance.random() < GONE else None
    return Sent(method, path, tuple(headers), pieces, hangs_up), mutated and hangs_up is None


def _cut(batch: Batch, body: bytes) -> tuple[bytes, ...]:
    if batch.chance.random() < 0.7 or not body:
        return (body,)
    places = sorted(batch.chance.randrange(len(body)) for _ in range(batch.chance.randint(1, 4)))
    return tuple(body[start:end] for start, end in zip([0, *places], [*places, len(body)], strict=True))


async def exchange(app: Any, sent: Sent) -> Answer:
    """Play one request as a server would: plain ASGI, with a client that may hang up."""
    scope = {
        "type": "http", "http_version": "1.1", "method": sent.method, "path": sent.path, "headers": list(sent.headers),
        "query_string": b"", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http",
    }  # fmt: skip
    answer = Answer()
    pieces = list(sent.pieces)
    gone = asyncio.Event()
    num_parts = 0
    if sent.hangs_up_after == 0:
        gone.set()

    async def receive() -> dict[str, Any]:
        if pieces and sent.hangs_up_after != 0:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal num_parts
        if message["type"] == "http.response.start":
            assert not answer.status, "two heads"
            answer.status, answer.headers = message["status"], dict(message["headers"])
            return
        answer.body += message.get("body", b"")
        answer.whole = not message.get("more_body", False)
        num_parts += 1
        if answer.whole or num_parts == sent.hangs_up_after:
            gone.set()

    await app(scope, receive, send)
    return answer


# -- what must come back -------------------------------------------------------------------------------------------


def check_answer(sent: Sent, answer: Answer) -> bool:
    """Whether it was taken. Raises AssertionError for an answer that no request may get."""
    if sent.hangs_up_after is not None:
        return False
    assert 200 <= answer.status < 500, f"{answer.status} {answer.body[:300]!r}"
    assert answer.status != 429, "an idle cluster refused it"
    assert answer.whole
    if answer.status != 200:
        if sent.method != "HEAD":
            error = json.loads(answer.body)["error"]
            assert set(error) == ERROR_FIELDS
            assert error["message"]
        return False
    if sent.path not in ROUTES or sent.method != "POST":
        return True
    is_stream = answer.headers.get(b"content-type", b"").startswith(b"text/event-stream")
    if sent.path == "/v1/responses":
        _check_response(answer.body.decode(), is_stream)
    elif is_stream:
        _check_events(answer.body.decode())
    elif sent.path.startswith("/v1"):
        _check_whole(json.loads(answer.body))
    return True


def _check_whole(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        assert choice["finish_reason"] in REASONS
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def _check_events(text: str) -> None:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", text[-200:]
    events = [json.loads(line) for line in lines[:-1]]
    assert not any("error" in event for event in events), events[-1]
    ended = _ended(events)
    assert ended
    assert all(reasons == 1 for reasons in ended.values()), "a choice ended more than once"


def _check_response(text: str, is_stream: bool) -> None:
    """A stream's last event holds what is the whole answer otherwise."""
    if is_stream:
        lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
        text = json.dumps(json.loads(lines[-1])["response"])
    assert json.loads(text)["status"] in ("completed", "incomplete"), text[-300:]


def _ended(events: Sequence[dict[str, Any]]) -> dict[int, int]:
    ends: dict[int, int] = {}
    for event in events:
        for choice in event["choices"]:
            ended = choice["finish_reason"] is not None
            assert not ended or choice["finish_reason"] in REASONS
            ends[choice["index"]] = ends.get(choice["index"], 0) + ended
    return ends
