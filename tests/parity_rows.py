"""The rows of the parity matrix: a request for each feature of the API."""

from __future__ import annotations

from typing import Any

from scripted_worker import EOS

from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.responses import ResponsesRequest

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PROMPT = "A prompt that is longer than some blocks of the cache are, so that the hand-off has frames to send. "
MAX_TOKENS = 24
Row = dict[str, Any]

SCHEMA = {
    "name": "reading",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
        "required": ["ok", "level"],
        "additionalProperties": False,
    },
}

LEVEL = {"type": "object", "properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}
TOOLS = [
    {"type": "function", "function": {"name": "set", "parameters": {**LEVEL, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop"}},
]
NAMED = {"type": "function", "function": {"name": "set"}}
STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
TAG = {"schema": LEVEL, "end": "</f>"}

FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]

# One field at least in each row; together they are all fields that change what is generated or told.
BOTH: dict[str, Row] = {
    "greedy": {},
    "temperature": {"temperature": 0.8, "seed": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.5, "seed": 6},
    "top_k": {"temperature": 1.0, "top_k": 3, "seed": 7},
    "min_p": {"temperature": 1.0, "min_p": 0.1, "seed": 8},
    "seed": {"temperature": 1.0, "seed": -1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -1.0},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {"66": 100, "70": -100}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": list(range(1, 200))},
    "stop_token_ids": {"stop_token_ids": list(range(1, 30))},
    "stop": {"stop": ["y", "gn"]},
    "include_stop_str_in_output": {"stop": ["y", "gn"], "include_stop_str_in_output": True},
    "bad_words": {"bad_words": ["y", "!"]},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {str(EOS): 100}},
    "skip_special_tokens": {"ignore_eos": True, "logit_bias": {str(EOS): 100}, "skip_special_tokens": False},
    "add_special_tokens": {"add_special_tokens": True},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 20},
    "return_token_ids": {"return_token_ids": True},
    "n": {"n": 3, "temperature": 1.0, "seed": 11},
    "response_format": {"response_format": {"type": "json_object"}, "temperature": 1.0, "seed": 4},
    "response_format with a schema": {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
    "structured_outputs": {"structured_outputs": {"regex": "(ab|cd?){4,9}!"}, "temperature": 1.0, "seed": 12},
    "structured_outputs of n choices": {
        "structured_outputs": {"choice": ["left", "right", "straight on"]},
        "n": 3,
        "temperature": 1.0,
        "seed": 13,
    },
    "structured_outputs and all that bans and biases": {
        "structured_outputs": {"grammar": 'root ::= ("x" [a-e]+ ";")+'},
        "min_tokens": 12,
        "bad_words": ["a"],
        "logit_bias": {"100": 5},
        "ignore_eos": True,
        "presence_penalty": 1.0,
    },
    "structured_outputs with a structural_tag": {
        "structured_outputs": {"structural_tag": {"structures": [{**TAG, "begin": "<f=a>"}], "triggers": ["<"]}},
        "logit_bias": {str(ord("<") + 1): 6},
        "temperature": 1.0,
        "seed": 18,
        "max_tokens": 96,
    },
    "prompt_logprobs": {"prompt_logprobs": 3, "n": 2, "temperature": 1.0, "seed": 19},
    "max_tokens": {"max_tokens": 1},
    "max_tokens 0": {"max_tokens": 0, "prompt_logprobs": 0},
}
ROWS: dict[str, tuple[str, Row]] = {
    **{f"chat {name}": (CHAT, row) for name, row in BOTH.items()},
    **{f"text {name}": (TEXT, row) for name, row in BOTH.items()},
    "chat logprobs": (CHAT, {"logprobs": True}),
    "chat top_logprobs": (CHAT, {"logprobs": True, "top_logprobs": 5}),
    "chat top_logprobs of n choices": (
        CHAT, {"logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1.0, "seed": 3},
    ),
    "chat top_logprobs and stop": (CHAT, {"logprobs": True, "top_logprobs": 2, "stop": ["y", "gn"]}),
    "chat logprobs of one token": (CHAT, {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}),
    "chat max_completion_tokens": (CHAT, {"max_completion_tokens": 5}),
    "chat add_generation_prompt": (CHAT, {"add_generation_prompt": False}),
    "chat continue_final_message": (CHAT, {"add_generation_prompt": False, "continue_final_message": True}),
    "chat chat_template_kwargs": (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}),
    "chat tools": (CHAT, {"tools": TOOLS}),
    "chat tool_choice": (CHAT, {"tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": 14}),
    "chat tool_choice of one tool": (CHAT, {"tools": TOOLS, "tool_choice": NAMED, "n": 2, "seed": 15}),
    "chat parallel_tool_calls": (
        CHAT, {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 96},
    ),
    "chat tools that are strict": (
        CHAT, {"tools": STRICT, "temperature": 1.0, "seed": 20},
    ),
    "text logprobs": (TEXT, {"logprobs": 4}),
    "text logprobs and token ids": (TEXT, {"logprobs": 0, "return_token_ids": True}),
    "text echo": (TEXT, {"echo": True}),
    "text echo and logprobs": (TEXT, {"echo": True, "logprobs": 2, "return_token_ids": True}),
    "text echo and logprobs of a batch": (
        TEXT, {"echo": True, "logprobs": 1, "n": 2, "temperature": 1.0, "seed": 21, "prompt": [PROMPT, "b", PROMPT]},
    ),
    "text echo of prompts that are only scored": (
        TEXT, {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": [PROMPT, "b"], "truncate_prompt_tokens": 70},
    ),
    "text best_of": (TEXT, {"best_of": 4, "n": 2, "temperature": 1.0, "seed": 16}),
    "chat top_logprobs and response_format": (
        CHAT, {"logprobs": True, "top_logprobs": 2, "response_format": {"type": "json_object"}},
    ),
    "text prompt batch": (TEXT, {"prompt": [PROMPT, PROMPT + "b", "c"], "n": 2, "temperature": 1.0, "seed": 2}),
    "text prompt ids": (TEXT, {"prompt": [5, 6, 7] * 15}),
    "responses input": (RESPONSES, {}),
    "responses instructions": (RESPONSES, {"instructions": "Be brief."}),
    "responses max_output_tokens": (RESPONSES, {"max_output_tokens": 5}),
    "responses top_logprobs": (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 3}),
    "responses text": (RESPONSES, {"text": {"format": {"type": "json_schema", **SCHEMA}}}),
    "responses tools": (RESPONSES, {"tools": FLAT_TOOLS}),
    "responses tool_choice": (RESPONSES, {"tools": FLAT_TOOLS, "tool_choice": "required"}),
    "responses parallel_tool_calls": (
        RESPONSES,
        {"tools": FLAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 96},
    ),
}  # fmt: skip
NOT_STREAMED = (  # it chooses among whole answers; as in vLLM
    "text best_of", *(f"{route} {name}" for route in ("chat", "text") for name in ("prompt_logprobs", "max_tokens 0")),
)  # fmt: skip
CELLS = [(name, stream) for name in ROWS for stream in (False, True) if not (stream and name in NOT_STREAMED)]
# Fields without a row, and why.
LABELS = dict.fromkeys(("user", "safety_identifier", "metadata"), "a label")
NO_ROW = {
    "model": "there is one", "priority": "says when, not what", "messages": "in every row", "prompt": "in every row",
    "stream": "a column", "stream_options": "in every streamed row", **LABELS,
}  # fmt: skip
NO_ROW_OF_RESPONSES = {
    "model": "there is one", "priority": "says when, not what", "input": "in every row", "stream": "a column",
    "stream_options": "changes nothing", "store": "refused", "previous_response_id": "refused",
    "temperature": "as in a chat; no two answers are alike without a seed", "top_p": "likewise",
    "prompt_cache_key": "a label", **LABELS,
}  # fmt: skip
MODELS: dict[str, tuple[type[RequestModel], dict[str, str]]] = {
    CHAT: (ChatRequest, NO_ROW), TEXT: (CompletionRequest, NO_ROW), RESPONSES: (ResponsesRequest, NO_ROW_OF_RESPONSES),
}  # fmt: skip


def rows_of_fields(path: str) -> dict[str, list[str]]:
    """Each field of the route's requests -> the rows that have it."""
    model, _ = MODELS[path]
    return {
        field: [name for name, (of, row) in ROWS.items() if of == path and field in row] for field in model.model_fields
    }


def body_of(name: str, *, stream: bool) -> tuple[str, Row]:
    path, row = ROWS[name]
    asked: Row = {"model": "memory", "temperature": 0}
    match path:
        case "/v1/responses":
            return path, asked | {"input": PROMPT, "max_output_tokens": MAX_TOKENS, "stream": stream} | row
        case "/v1/chat/completions":
            asked |= {"messages": [{"role": "user", "content": PROMPT}]}
        case _:
            asked |= {"prompt": PROMPT}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return path, asked | {"max_tokens": MAX_TOKENS} | row
