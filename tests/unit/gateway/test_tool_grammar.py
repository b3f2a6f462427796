"""What a demanded call must look like, held against a validator of JSON schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kvferry_gateway.requests.tools import MAX_SCHEMA_DEPTH, Function, Tool, depth_of, schema_of_calls

TREE = {
    "type": "object",
    "properties": {"value": {"$ref": "#/$defs/value"}, "left": {"$ref": "#"}},
    "required": ["value"],
    "additionalProperties": False,
    "$defs": {"value": {"type": "integer"}},
}


def tool(name: str, parameters: dict[str, Any] | None) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters=parameters))


def is_valid(calls: Any, *, parallel: bool = True) -> bool:
    schema = json.loads(schema_of_calls([tool("plant", TREE), tool("rest", None)], parallel=parallel))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).is_valid(calls)


PLANT = {"name": "plant", "arguments": {"value": 1, "left": {"value": 2}}}
REST = {"name": "rest", "arguments": {}}


@pytest.mark.parametrize("calls", [[PLANT], [REST], [PLANT, REST, PLANT]])
def test_calls_of_the_tools_are_valid(calls: Any) -> None:
    assert is_valid(calls)


@pytest.mark.parametrize(
    "calls",
    [[], PLANT, [{"name": "other", "arguments": {}}], [{"name": "plant", "arguments": {}}], [{"name": "rest"}],
     [{"name": "plant", "arguments": {"value": 1, "left": {"value": "2"}}}], [{**REST, "id": 1}],
     [{"name": "rest", "arguments": {"value": 1}}]],
)  # fmt: skip
def test_other_calls_are_not(calls: Any) -> None:
    assert not is_valid(calls)


def test_there_is_one_call_where_calls_are_not_to_be_parallel() -> None:
    assert is_valid([REST], parallel=False)
    assert not is_valid([REST, REST], parallel=False)


def test_depth_is_counted_up_to_the_limit() -> None:
    assert [depth_of(value) for value in (1, {}, {"a": [1]}, [[[]]])] == [0, 1, 2, 3]
    nested: Any = {}
    for _ in range(500):
        nested = {"a": nested}
    assert depth_of(nested) == MAX_SCHEMA_DEPTH + 1
