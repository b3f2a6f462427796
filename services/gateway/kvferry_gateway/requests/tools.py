"""Tools of a request: functions that the model may call, and the grammar of calls that it must make."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from kvferry_gateway.errors import bad_request
from kvferry_gateway.requests.request_model import RequestModel

MAX_TOOLS: Final = 128  # OpenAI's limit
MAX_DESCRIPTION_CHARS: Final = 1 << 16
MAX_SCHEMA_DEPTH: Final = 64

Schema = dict[str, Any]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class Function(RequestModel):
    """`strict`: its arguments follow the schema also where the model calls it of its own accord."""

    name: FunctionName
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    parameters: dict[str, Any] | None = None  # JSON schema; None: it takes none
    strict: bool | None = None

    @model_validator(mode="after")
    def _not_too_deep(self) -> Function:
        if depth_of(self.parameters) > MAX_SCHEMA_DEPTH:
            raise bad_request(f"A schema of 'tools' has more than {MAX_SCHEMA_DEPTH} levels.", "tools", "invalid_value")
        return self


class Tool(RequestModel):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **function}}

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionChoice(RequestModel):
    name: FunctionName


class NamedTool(RequestModel):
    type: Literal["function"]
    function: FunctionChoice


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def schema_of_calls(tools: Sequence[Tool], *, parallel: bool) -> str:
    """JSON schema of a list of calls."""
    calls, definitions = schemas_of_calls(tools, lambda tool: tool.schema_of_arguments)
    return json.dumps({**list_of(calls, parallel=parallel), "$defs": definitions}, ensure_ascii=False)


def list_of(calls: Sequence[Schema], *, parallel: bool) -> Schema:
    """Of calls, or of a single one where they are not to be parallel."""
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel else {**schema, "maxItems": 1}


def schemas_of_calls(
    tools: Sequence[Tool], arguments_of: Callable[[Tool], Schema], key: str = "arguments"
) -> tuple[list[Schema], Schema]:
    """JSON schemas of a call to each tool, and the `$defs` that they name. Each tool's own schema stands there, its
    references turned to that place."""
    definitions: Schema = {}
    calls = []
    for number, tool in enumerate(tools):
        root = f"#/$defs/{number}"
        definitions[str(number)] = _moved(arguments_of(tool), root)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, key: {"$ref": root}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return calls, definitions


def depth_of(value: Any, limit: int = MAX_SCHEMA_DEPTH) -> int:
    """Levels of nesting, counted up to one above `limit`."""
    if limit < 0 or not isinstance(value, (dict, list)):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    return 1 + max((depth_of(part, limit - 1) for part in parts), default=0)


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to itself hold where it stands at `root`."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + part[1:] if key == "$ref" and isinstance(part, str) and part.startswith("#") else _moved(part, root)
        for key, part in schema.items()
    }
