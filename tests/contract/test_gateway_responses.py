"""`/v1/responses` as clients see it: the real application on a real socket, a worker that says exact texts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError
from openai.types.responses import Response
from pydantic import BaseModel
from scripted_worker import MODEL, Cluster, text_of, tokens_of

from kvferry.wire.fields import unpack_tokens
from kvferry_gateway.body import NEUTRAL
from kvferry_gateway.requests.responses import ResponsesRequest

pytestmark = pytest.mark.usefixtures("no_leaks")

PATH = "/v1/responses"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.reasoning_content | default('') }}{{ m.content }}"
    "{% for c in m.tool_calls | default([]) %}{{ c.function | tojson }}{% endfor %}{% endfor %}<assistant>"
    "{% if false %}</think>{% endif %}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "strict": None,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'

Serve = Callable[..., AbstractAsyncContextManager[Cluster]]


@pytest.fixture
def serve(no_leaks: None, tmp_path: Path) -> Serve:
    @asynccontextmanager
    async def serving(answer: str, **settings: Any) -> AsyncIterator[Cluster]:
        options = {"template": TEMPLATE, "max_context": 4096}
        async with Cluster(tmp_path, model_options=options, **settings) as cluster:
            await cluster.speaker(answer, max_model_len=4096, num_blocks=256)
            yield cluster

    return serving


@asynccontextmanager
async def client_of(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def ask(cluster: Cluster, **fields: Any) -> tuple[Response, list[Any]]:
    """The whole response, once the stream's last event has been seen to hold the same; and the stream's events."""
    asked: Any = {"model": MODEL, "input": "hi", "temperature": 0, **fields}
    async with client_of(cluster) as client:
        whole = await client.responses.create(**asked)
        events = [event async for event in await client.responses.create(**asked, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert timeless(events[-1].response) == timeless(whole)
    return whole, events


def timeless(response: Response) -> Any:
    found = response.model_dump(exclude={"id", "created_at", "usage"})
    for item in found["output"]:
        del item["id"]
        item.pop("call_id", None)
    return found


def prompt_of(cluster: Cluster) -> str:
    worker = next(iter(cluster.workers.values()))
    return text_of(unpack_tokens(worker.works[-1].prompt).tolist())


async def test_a_text_streamed_and_not(serve: Serve) -> None:
    async with serve("Grüße 😀.") as cluster:
        whole, events = await ask(cluster, instructions="Be brief.", metadata={"k": "v"})
        assert whole.output_text == "Grüße 😀."
        assert (whole.status, whole.object, whole.incomplete_details) == ("completed", "response", None)
        assert (whole.store, whole.metadata) == (False, {"k": "v"})
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
        assert prompt_of(cluster) == "<system>Be brief.<user>hi<assistant>"
        kinds = [event.type for event in events]
        num_deltas = kinds.count("response.output_text.delta")
        assert num_deltas >= 8
        assert kinds == [
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
            *["response.output_text.delta"] * num_deltas, "response.output_text.done", "response.content_part.done",
            "response.output_item.done", "response.completed",
        ]  # fmt: skip
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Grüße 😀."


async def test_a_call_streamed_and_not(serve: Serve) -> None:
    async with serve("Let me see.\n" + CALL) as cluster:
        whole, events = await ask(cluster, tools=[TOOL])
        message, call = whole.output
        assert whole.output_text == "Let me see."
        assert (message.type, call.type) == ("message", "function_call")
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Zürich"})
        kinds = [event.type for event in events if not event.type.endswith("delta")]
        assert kinds[-5:] == [
            "response.output_item.done", "response.output_item.added", "response.function_call_arguments.done",
            "response.output_item.done", "response.completed",
        ]  # fmt: skip
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == call.arguments


async def test_the_clients_own_accumulator_reads_the_stream(serve: Serve) -> None:
    class Weather(BaseModel):
        city: str

    async with serve('{"city": "Bern"}') as cluster, client_of(cluster) as client:
        async with client.responses.stream(model=MODEL, input="hi", text_format=Weather) as stream:
            async for _ in stream:
                pass
            found = await stream.get_final_response()
        assert found.output_parsed == Weather(city="Bern")


async def test_thoughts_are_an_item_of_their_own(serve: Serve) -> None:
    async with serve("<think>\nHm.\n</think>\n\nYes.") as cluster:
        whole, events = await ask(cluster)
        assert [item.type for item in whole.output] == ["reasoning", "message"]
        assert whole.output[0].content[0].text == "Hm."
        assert whole.output_text == "Yes."
        assert "response.reasoning_text.delta" in [event.type for event in events]


async def test_a_conversation_goes_back_as_items(serve: Serve) -> None:
    async with serve("<think>Hm.</think>Let me see.\n" + CALL) as cluster:
        first, _ = await ask(cluster, tools=[TOOL])
        call = first.output[-1]
        history = [
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            *[item.model_dump(exclude_none=True) for item in first.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ]
        await ask(cluster, input=history)
        assert prompt_of(cluster) == (
            '<user>Weather?<assistant>Hm.Let me see.{"name": "get_weather", "arguments": {"city": "Zürich"}}'
            "<tool>sunny<assistant>"
        )


async def test_what_max_output_tokens_cuts_is_incomplete(serve: Serve) -> None:
    async with serve("A long answer.") as cluster:
        whole, events = await ask(cluster, max_output_tokens=6)
        assert (whole.status, whole.output_text) == ("incomplete", "A long")
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert events[-1].type == "response.incomplete"


async def test_a_demanded_call_goes_to_the_workers_as_a_grammar(serve: Serve) -> None:
    async with serve('{"city": "Bern"}') as cluster:
        whole, _ = await ask(cluster, tools=[TOOL], tool_choice={"type": "function", "name": "get_weather"})
        assert [(item.type, item.arguments) for item in whole.output] == [("function_call", '{"city": "Bern"}')]
        grammar = next(iter(cluster.workers.values())).works[-1].sampling.grammar
        assert grammar is not None
        assert json.loads(grammar.source) == TOOL["parameters"]


async def test_a_stream_that_fails_says_so_in_its_last_event(no_leaks: None, tmp_path: Path) -> None:
    async with Cluster(tmp_path, failure_budget=1) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        worker.accepted = lambda work: worker.publish(work, [(0, tokens_of("a")[0])])
        asked = {"model": MODEL, "input": "hi", "stream": True}
        lines = []
        async with cluster.client.stream("POST", PATH, json=asked) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if line == "event: response.output_text.delta":
                    worker.publish(worker.works[-1], end=("error", 1))
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert [line[7:] for line in lines if line.startswith("event: ")] == [event["type"] for event in events]
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["message"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [{"type": "image"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": "x" * 5000}, "input"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}}}}, "text.format.schema"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"messages": []}, "messages"),
]


async def test_what_is_wrong_is_named_as_the_client_has_sent_it(serve: Serve) -> None:
    async with serve("never") as cluster:
        for fields, param in BAD:
            response = await cluster.client.post(PATH, json={"model": MODEL, "input": "hi", **fields})
            assert response.status_code == 400, (fields, response.text)
            assert response.json()["error"]["param"] == param, (fields, response.text)
        for field in NEUTRAL[ResponsesRequest]:
            response = await cluster.client.post(PATH, json={"model": MODEL, "input": "hi", field: "no such value"})
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)
        assert not next(iter(cluster.workers.values())).works
        async with client_of(cluster) as client:
            with pytest.raises(BadRequestError) as refused:
                await client.responses.create(model=MODEL, input="hi", store=True)
            assert refused.value.code == "unsupported_value"


async def test_log_probabilities_come_with_the_text(serve: Serve) -> None:
    """A worker that tells none is broken off: the request did ask for them."""
    async with serve("abc", failure_budget=1) as cluster:
        asked = {"model": MODEL, "input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
        response = await cluster.client.post(PATH, json=asked)
        assert response.status_code == 503
        assert next(iter(cluster.workers.values())).works[-1].sampling.num_logprobs == 2
