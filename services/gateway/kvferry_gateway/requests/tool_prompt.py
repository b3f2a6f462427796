"""Tools for chat templates that know of none: written into the messages, in Hermes' form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvferry_gateway.parsing.hermes import CLOSE, OPEN

Message = Mapping[str, Any]

_INTRODUCTION: Final = """# Tools

You may call one or more functions to assist with the user query. You are given function signatures within <tools></tools> tags:
<tools>
{tools}
</tools>

For each function call, return a JSON object with function name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # noqa: E501 - as the models of this form have been trained with


def with_tools_spelled(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`messages` without anything of tools but text: roles `system`, `user` and `assistant` alone."""
    spelled = [_spelled(message) for message in messages]
    if not tools:
        return spelled
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=listed)
    if spelled and spelled[0]["role"] == "system":
        first = {**spelled[0], "content": f"{spelled[0]['content']}\n\n{introduction}"}
        return [first, *spelled[1:]]
    return [{"role": "system", "content": introduction}, *spelled]


def _spelled(message: Message) -> dict[str, Any]:
    made = {key: part for key, part in message.items() if key not in ("tool_calls", "tool_call_id")}
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if calls := message.get("tool_calls"):
        texts = [f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls]
        made["content"] = "\n".join([made["content"], *texts] if made["content"] else texts)
    return made
