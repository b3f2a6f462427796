"""Every kind of answer, whole and the same although its decode worker was killed."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import httpx
from api_cluster import timeless
from runners import native_library
from scene import SHORT, STREAM_S, TRIES, Scene, send

LEVELS = {
    "type": "object",
    "properties": {"levels": {"type": "array", "items": {"enum": ["low", "high"]}, "minItems": 60, "maxItems": 90}},
    "required": ["levels"],
    "additionalProperties": False,
}
TOOL = {"name": "set", "parameters": LEVELS}
TAG = {"structures": [{"begin": "<f=a>", "schema": LEVELS, "end": "</f>"}], "triggers": ["<"]}
CHATS, TEXTS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def requests_of_every_kind(prompt: list[int], tag_opener: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (path, body). Each has some hundred tokens to give."""
    said = {"messages": [{"role": "user", "content": "Set the levels."}], "max_tokens": 200}
    text = {"prompt": prompt, "max_tokens": 200, "ignore_eos": True}
    return {
        "tools": (CHATS, {**said, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}),
        "responses": (
            RESPONSES,
            {
                "input": "Set the levels.",
                "max_output_tokens": 200,
                "tools": [{"type": "function", **TOOL}],
                "tool_choice": {"type": "function", "name": "set"},
            },
        ),
        "structural_tag": (
            TEXTS,
            {**text, "structured_outputs": {"structural_tag": TAG}, "logit_bias": {str(tag_opener): 100}},
        ),
        "best_of": (TEXTS, {**text, "best_of": 2, "temperature": 0.9, "seed": 3}),
        "prompt_logprobs": (TEXTS, {**text, "prompt_logprobs": 2}),
        "echo": (TEXTS, {**text, "echo": True, "logprobs": 1}),
    }


async def test_every_kind_of_answer_is_the_same_after_its_decode_worker_was_killed(lone_pair: Scene) -> None:
    native_library()  # or skip: the torch engine is not exact
    scene = lone_pair
    kinds = requests_of_every_kind(scene.prompts.tokens(SHORT), scene.tokenizer.token_to_id("<"))

    async with httpx.AsyncClient(base_url=scene.stack.url, timeout=STREAM_S, trust_env=False) as http:

        async def ask(kind: str, label: str) -> Any:
            path, body = kinds[kind]
            asked = {"model": "smollm2", "temperature": 0, **body}
            response = await http.post(path, json=asked, headers={"x-request-id": label})
            assert response.status_code == 200, response.text
            return timeless(response.json())

        undisturbed = {kind: await ask(kind, f"undisturbed-{kind}") for kind in kinds}
        for attempt in range(TRIES):
            asking = {kind: asyncio.create_task(ask(kind, f"{kind}-{attempt}")) for kind in kinds}
            for kind in kinds:
                await scene.watch.given(f"{kind}-{attempt}", 8)
            in_time = not any(task.done() for task in asking.values())
            send(next(row for row in scene.rows if row["role"] == "decode"), signal.SIGKILL)
            found = {kind: await task for kind, task in asking.items()}
            for kind in kinds:
                assert found[kind] == undisturbed[kind], kind
            if in_time:
                break
            await scene.recover()
    assert in_time, "no answer was under way when the worker was killed"
