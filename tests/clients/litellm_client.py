"""litellm: a text, streamed and not, and a demanded call, streamed and not. Prints JSON."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

import litellm

url, prompt = sys.argv[1:]
litellm.suppress_debug_info = True
parameters = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "room": {"enum": ["kitchen", "hall"]}},
    "required": ["on", "room"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "SetLight", "parameters": parameters}}]
asked = {
    "model": "openai/smollm2", "api_base": f"{url}/v1", "api_key": "unused", "temperature": 0, "max_tokens": 48,
    "messages": [{"role": "user", "content": prompt}],
}  # fmt: skip
demand = asked | {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 128}


def call_of(answer):
    function = answer.choices[0].message.tool_calls[0].function
    return [function.name, json.loads(function.arguments)]


chunks = list(litellm.completion(**asked, stream=True))
call = call_of(litellm.completion(**demand))
assert call == call_of(litellm.stream_chunk_builder(list(litellm.completion(**demand, stream=True))))
shown = {
    "text": litellm.completion(**asked).choices[0].message.content,
    "streamed": litellm.stream_chunk_builder(chunks).choices[0].message.content,
    "call": call,
}
print(json.dumps(shown))
