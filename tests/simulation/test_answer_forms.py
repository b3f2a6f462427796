"""Forms of answers that the drawn workload lacks, while workers die under them: all as of an undisturbed run.

Tools, the Responses API, `best_of`, batches of prompts, reasoning parts and schemas: their workers see nothing but
tokens, and what a gateway makes of these must not depend on how often they were computed, or in what pieces they came.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass
from typing import Any

import pytest
from api_cluster import joined, timeless
from clients import RETRY_AFTER_S, Exchange
from cluster import settled
from faults import STATES
from workload import MODEL_NAME
from world import World, seen, simulate, total

from kvferry.runtime import now
from kvferry.worker.worker import Worker

TOOLS = [
    {"type": "function", "function": {"name": name, "strict": True, "parameters": {
        "type": "object", "properties": {"at": {"enum": places}}, "required": ["at"], "additionalProperties": False,
    }}}
    for name, places in (("go", ["left", "right"]), ("wait", ["here"]))
]  # fmt: skip
SCHEMA = {"type": "array", "items": {"enum": [True, None, 12.5]}, "minItems": 6, "maxItems": 12}
THOUGHT = "<think>[a-f ]{9,30}</think>[x-z]{5,20}"
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TALK = {"messages": [{"role": "user", "content": "where to?"}]}
SAMPLED = {"temperature": 1.0, "seed": 5}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "tools required": (CHAT, {**TALK, "tools": TOOLS, "tool_choice": "required", "max_tokens": 150}),
    "a tool by name": (
        CHAT,
        {**TALK, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "wait"}}, "max_tokens": 150},
    ),
    "tools as it likes": (CHAT, {**TALK, "tools": TOOLS, "max_tokens": 60}),
    "reasoning": (CHAT, {**TALK, "max_tokens": 90, "n": 2, "structured_outputs": {"regex": THOUGHT}}),
    "schema": (
        CHAT,
        {**TALK, "max_tokens": 150, "response_format": {
            "type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMA}}},
    ),
    "batch": (TEXT, {"prompt": ["one " * 30, "two " * 40, "three"], "max_tokens": 40, "n": 2}),
    "response": (RESPONSES, {"input": "say " * 25, "max_output_tokens": 60}),
    "response with tools": (
        RESPONSES,
        {"input": "go " * 5, "max_output_tokens": 150, "tool_choice": "required",
         "tools": [{"type": "function", **tool["function"]} for tool in TOOLS]},
    ),
    "best of": (TEXT, {"prompt": "best " * 20, "best_of": 4, "n": 2, "max_tokens": 40}),
}  # fmt: skip
UNSTREAMED = ("best of",)  # the API has no stream of it


@dataclass(frozen=True)
class Asked:
    """As `Exchange` wants a request."""

    label: str
    path: str
    document: dict[str, Any]
    direct: bool

    def body(self) -> bytes:
        return json.dumps(self.document).encode()


def asked() -> list[Asked]:
    """Every form, whole and as a stream."""
    made = []
    for form, (path, fields) in FORMS.items():
        for stream in (False, True):
            if stream and form in UNSTREAMED:
                continue
            more = {"temperature": 0} if path == RESPONSES else SAMPLED  # which takes no seed
            document = {"model": MODEL_NAME, "stream": stream, **more, **fields}
            made.append(Asked(f"{form}{' streamed' if stream else ''}", path, document, direct=stream))
    return made


async def answered(world: World, request: Asked) -> bytes:
    """The body of the answer. A client asks again after a 429 or 503."""
    while True:
        body = bytearray()
        exchange = Exchange(world.cores[0], request, body.extend)
        exchange.begin()
        await exchange.over.wait()
        await exchange.read_out()
        if exchange.status not in (429, 503):
            assert exchange.status == 200, body.decode()
            return bytes(body)
        await asyncio.sleep(RETRY_AFTER_S)


def said(body: bytes, *, stream: bool) -> Any:
    """What an answer says, apart from names and times that each one gets anew, and from the pieces it came in."""
    if not stream:
        return timeless(json.loads(body))
    events = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]
    assert not any("error" in event for event in events), events
    if "type" not in events[0]:
        return joined(events)
    pieces: dict[str, str] = {}
    for event in events:
        if isinstance(event.get("delta"), str):
            place = f"{event['type']} {event['output_index']}"
            pieces[place] = pieces.get(place, "") + event["delta"]
    return pieces, timeless(events[-1]["response"])


async def start(world: World) -> None:
    own = {"local_prefill_threshold": 0, "reasoning_parser": "think", "failure_budget": 100}
    await world.start(prefill=2, decode=2, **{f"gateway_{name}": value for name, value in own.items()})


async def undisturbed(world: World, found: dict[str, Any]) -> None:
    await start(world)
    for request in asked():
        found[request.label] = said(await answered(world, request), stream=bool(request.document["stream"]))


def right_answers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    simulate(0, lambda world: undisturbed(world, found))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_every_form_of_an_answer_is_that_of_an_undisturbed_run_whoever_dies(seed: int) -> None:
    right = right_answers()
    struck: set[str] = set()

    def victim(world: World, phase: str) -> Worker[Any] | None:
        """A worker with a sequence in this phase, of a form that no kill has struck yet if there is one."""
        found = None
        for worker in world.workers:
            labels = {s.work.request_id for s in worker.scheduler.sequences.values() if s.state in STATES[phase]}
            if labels - struck:
                return worker
            found = worker if labels else found
        return found

    async def ask(world: World, request: Asked) -> None:
        body = await answered(world, request)
        assert said(body, stream=bool(request.document["stream"])) == right[request.label], request.label

    async def scenario(world: World) -> None:
        await start(world)
        phases = itertools.cycle(STATES)
        began = now()
        while len(struck) < len(right):
            assert now() - began < 120.0, f"never struck: {set(right) - struck}"
            asking = [asyncio.create_task(ask(world, request)) for request in asked()]
            for phase in itertools.islice(phases, 2):
                await asyncio.sleep(0.3 * world.runtime.uniform())
                if (worker := victim(world, phase)) is None:
                    continue
                struck.update(sequence.work.request_id for sequence in worker.scheduler.sequences.values())
                name = worker.settings.name
                await world.kill(worker)
                await (world.prefill if worker.role == "prefill" else world.decode)(name)
            await asyncio.gather(*asking)
            await settled(lambda: len(world.cores[0].fleet.registry) == len(world.workers), within=5.0)
        assert seen(world, "kvferry_replacement_total") > len(right)
        assert total(world, "kvferry_pull_total", outcome="received") > 0

    simulate(seed, scenario)
