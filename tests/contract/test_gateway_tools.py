"""Tools and thoughts as clients see them: the real application on a real socket, a worker that says exact texts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from scripted_worker import MODEL, VOCAB_SIZE, Cluster, chat, text_of, tokens_of

from kvferry.wire.fields import unpack_tokens

pytestmark = pytest.mark.usefixtures("no_leaks")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string"}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '{"name": "get_weather", "arguments": {"city": "Zürich"}}'
CALLS = f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n" + '{"name": "get_time"}\n</tool_call>'
MESSAGES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endif %}{% endfor %}<assistant>"
)
HERMES = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + MESSAGES
LLAMA3 = "{% if tools %}{{ tools | tojson }}<|python_tag|>{% endif %}" + MESSAGES
MISTRAL = "{% if tools %}{{ tools | tojson }}[TOOL_CALLS]{% endif %}" + MESSAGES
THINKING = HERMES + "{% if false %}</think>{% endif %}"

Serve = Callable[..., AbstractAsyncContextManager[Cluster]]


@pytest.fixture
def serve(no_leaks: None, tmp_path: Path) -> Serve:
    @asynccontextmanager
    async def serving(answer: str, template: str = HERMES, **settings: Any) -> AsyncIterator[Cluster]:
        special = settings.pop("special", ())
        options = {"template": template, "special": special, "max_context": 4096}
        async with Cluster(tmp_path, model_options=options, **settings) as cluster:
            await cluster.speaker(spelled(answer, special), max_model_len=4096, num_blocks=256)
            yield cluster

    return serving


def spelled(answer: str, special: tuple[str, ...]) -> list[int]:
    """The tokens of `answer`, in which special tokens are spelled out."""
    tokens: list[int] = []
    rest = answer
    while rest:
        found = next((number for number, name in enumerate(special) if rest.startswith(name)), None)
        tokens += tokens_of(rest[0]) if found is None else [VOCAB_SIZE + found]
        rest = rest[1 if found is None else len(special[found]) :]
    return tokens


async def ask(cluster: Cluster, **fields: Any) -> Any:
    """The choice of the whole answer, once the stream has been seen to add up to the same."""
    asked = chat(**{"tools": [WEATHER, TIME], **fields})
    response = await cluster.client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0) as client:
        message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
        reasons = []
        extra = {"return_token_ids": asked.pop("return_token_ids", False)}  # vLLM's, unknown to the client
        async for chunk in await client.chat.completions.create(**asked, stream=True, extra_body=extra):
            delta = chunk.choices[0].delta
            message["content"] += delta.content or ""
            message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                if call.id is not None:
                    assert call.type == "function"
                    assert call.function.arguments == ""
                    assert call.index == len(message["tool_calls"])
                    message["tool_calls"].append({"name": call.function.name, "arguments": ""})
                else:
                    message["tool_calls"][call.index]["arguments"] += call.function.arguments
            reasons.append(chunk.choices[0].finish_reason)
    assert [reason for reason in reasons if reason] == [choice["finish_reason"]]
    whole = choice["message"]
    assert message["content"] == (whole["content"] or "")
    assert message["reasoning_content"] == whole.get("reasoning_content", "")
    assert message["tool_calls"] == [call["function"] for call in whole.get("tool_calls", [])]
    return choice


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


async def prompt_of(cluster: Cluster) -> str:
    worker = next(iter(cluster.workers.values()))
    work = await worker.until(lambda: worker.works)
    return text_of(unpack_tokens(work[-1].prompt).tolist())


async def test_calls_of_the_models_own_accord(serve: Serve) -> None:
    async with serve(CALLS) as cluster:
        choice = await ask(cluster)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        assert calls_of(choice) == [("get_weather", {"city": "Zürich"}), ("get_time", {})]
        assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
        assert "Tells the weather." in await prompt_of(cluster)


async def test_only_one_call_where_calls_are_not_to_be_parallel(serve: Serve) -> None:
    async with serve(CALLS) as cluster:
        assert calls_of(await ask(cluster, parallel_tool_calls=False)) == [("get_weather", {"city": "Zürich"})]


async def test_with_the_choice_none_the_model_is_told_of_no_tool(serve: Serve) -> None:
    async with serve("<tool_call>") as cluster:
        choice = await ask(cluster, tool_choice="none")
        assert (choice["message"]["content"], choice["finish_reason"]) == ("<tool_call>", "stop")
        assert "get_weather" not in await prompt_of(cluster)


async def test_an_answer_without_a_call_is_an_answer(serve: Serve) -> None:
    async with serve("It is <b>sunny</b>. \n") as cluster:
        choice = await ask(cluster, tool_choice="auto", return_token_ids=True)
        assert choice["message"]["content"] == "It is <b>sunny</b>. \n"
        assert choice["message"].get("tool_calls") is None
        assert choice["finish_reason"] == "stop"


async def test_a_call_that_max_tokens_cut_ends_by_length(serve: Serve) -> None:
    async with serve(CALLS) as cluster:
        choice = await ask(cluster, max_tokens=len("Let me see.\n<tool_call>\n") + 50)
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city": ')


@pytest.mark.parametrize(
    ("template", "answer", "special"),
    [
        (LLAMA3, "<|python_tag|>" + CALL.replace("arguments", "parameters") + '; {"name": "get_time"}',
         ("<|python_tag|>",)),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, " + '{"name": "get_time", "arguments": {}}]', ("[TOOL_CALLS]",)),
        (MISTRAL, '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich"}[TOOL_CALLS]get_time[ARGS]{}',
         ("[TOOL_CALLS]", "[ARGS]")),
    ],
)  # fmt: skip
async def test_forms_whose_marks_are_special_tokens(
    serve: Serve, template: str, answer: str, special: tuple[str, ...]
) -> None:
    async with serve(answer, template, special=special) as cluster:
        for fields in ({}, {"stop": ["never"]}, {"return_token_ids": True}):
            choice = await ask(cluster, **fields)
            assert calls_of(choice) == [("get_weather", {"city": "Zürich"}), ("get_time", {})]
            assert choice["message"]["content"] is None


async def test_a_setting_names_another_form(serve: Serve) -> None:
    async with serve(CALL, HERMES, tool_call_parser="llama3_json") as cluster:
        assert calls_of(await ask(cluster)) == [("get_weather", {"city": "Zürich"})]


async def test_a_template_that_knows_of_no_tools_is_told_in_text(serve: Serve) -> None:
    history = [
        {"role": "user", "content": "What's the weather?"},
        {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Bern"}'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]  # fmt: skip
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    async with serve(CALLS, template) as cluster:
        assert len(calls_of(await ask(cluster, messages=history))) == 2
        prompt = await prompt_of(cluster)
        assert prompt.startswith("<system># Tools")
        assert '"name": "get_weather", "description": "Tells the weather."' in prompt
        assert '<assistant><tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>' in prompt
        assert prompt.endswith("<user><tool_response>\nsunny\n</tool_response><assistant>")


async def test_a_template_gets_the_arguments_of_earlier_calls_as_an_object(serve: Serve) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "CET"}'}}
    broken = {"id": "b", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": '}}
    history = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call, broken], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "noon"}]},
    ]
    async with serve("Noon.") as cluster:
        await ask(cluster, messages=history)
        calls = 'get_time{"zone": "CET"}get_time"{\\"zone\\": "'
        assert (await prompt_of(cluster)).endswith(calls + "<tool>noon<assistant>")


async def test_demanded_calls_go_to_the_workers_as_a_grammar(serve: Serve) -> None:
    async with serve(f"[{CALL}]") as cluster:
        choice = await ask(cluster, tool_choice="required")
        assert (choice["finish_reason"], calls_of(choice)) == ("tool_calls", [("get_weather", {"city": "Zürich"})])
        grammar = next(iter(cluster.workers.values())).works[-1].sampling.grammar
        assert grammar is not None
        schema = json.loads(grammar.source)
        assert schema["$defs"]["0"]["properties"]["city"] == {"$ref": "#/$defs/0/$defs/city"}
        assert "maxItems" not in schema


async def test_a_named_tool_gets_its_arguments_alone(serve: Serve) -> None:
    async with serve('{"city": "Bern"}') as cluster:
        choice = await ask(cluster, tool_choice={"type": "function", "function": {"name": "get_weather"}})
        assert (choice["finish_reason"], calls_of(choice)) == ("tool_calls", [("get_weather", {"city": "Bern"})])
        assert choice["message"]["content"] is None


async def test_thoughts_are_told_apart(serve: Serve) -> None:
    async with serve(f"<think>\nZürich, I guess.\n</think>\n\nSo:\n<tool_call>{CALL}</tool_call>", THINKING) as cluster:
        choice = await ask(cluster)
        assert choice["message"]["reasoning_content"] == "Zürich, I guess."
        assert choice["message"]["content"] == "So:"
        assert calls_of(choice) == [("get_weather", {"city": "Zürich"})]


async def test_thoughts_that_the_prompt_begins(serve: Serve) -> None:
    answer = 'Hm.\n</think>\n\n{"city": "Bern"}'
    async with serve(answer, THINKING + "<think>\n", special=("</think>",)) as cluster:
        choice = await ask(cluster, tools=[])
        assert choice["message"]["reasoning_content"] == "Hm."
        assert choice["message"]["content"] == '{"city": "Bern"}'
        named = await ask(cluster, tool_choice={"type": "function", "function": {"name": "get_weather"}})
        assert named["message"]["reasoning_content"] == "Hm."
        assert calls_of(named) == [("get_weather", {"city": "Bern"})]
        grammar = next(iter(cluster.workers.values())).works[-1].sampling.grammar
        assert grammar is not None
        assert grammar.after == 257, "behind </think>"


async def test_thoughts_are_text_where_the_setting_says_so(serve: Serve) -> None:
    async with serve("<think>Hm.</think>Yes.", THINKING, reasoning_parser="none") as cluster:
        choice = await ask(cluster)
        assert choice["message"]["content"] == "<think>Hm.</think>Yes."


def message_with(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]}


NESTED = json.loads('{"a":' * 200 + "{}" + "}" * 200)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": NESTED}}]}, "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
      "tool_choice": "required"}, "tools"),
    (message_with(tool_calls=[{"id": "a", "function": {"name": "f"}}]), "messages[1].tool_calls[0].function.arguments"),
    (message_with(role="user", tool_calls=[{"id": "a", "function": {"name": "f", "arguments": ""}}]),
     "messages[1].tool_calls"),
    (message_with(role="tool"), "messages[1].tool_call_id"),
    (message_with(content=None), "messages[1].content"),
]  # fmt: skip


async def test_what_is_wrong_with_tools_is_named(serve: Serve) -> None:
    async with serve("never") as cluster:
        for fields, param in BAD:
            response = await cluster.client.post("/v1/chat/completions", json=chat(**{"tools": [WEATHER], **fields}))
            assert response.status_code == 400, (fields, response.text)
            assert response.json()["error"]["param"] == param, (fields, response.text)
        assert not next(iter(cluster.workers.values())).works


async def test_a_model_whose_form_is_not_known_makes_no_calls_of_its_own(serve: Serve) -> None:
    async with serve(f"[{CALL}]", "{{ tools }}" + MESSAGES) as cluster:
        response = await cluster.client.post("/v1/chat/completions", json=chat(tools=[WEATHER]))
        assert response.status_code == 400
        assert "--tool-call-parser" in response.json()["error"]["message"]
        assert len(calls_of(await ask(cluster, tool_choice="required"))) == 1


async def test_the_tools_of_a_conversation_count_when_it_is_tokenised(serve: Serve) -> None:
    async with serve("") as cluster:
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
        counts = [
            (await cluster.client.post("/tokenize", json={**asked, "tools": tools})).json()["count"]
            for tools in ([], [WEATHER])
        ]
        assert counts[1] > counts[0] + 100
