"""What `response_format` and `structured_outputs` make of a request, and what they refuse by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvferry.wire.sampling import MAX_GRAMMAR_CHARS, Grammar
from kvferry_gateway.body import parse
from kvferry_gateway.errors import ApiError
from kvferry_gateway.requests.openai import CompletionRequest
from kvferry_gateway.requests.structured import ANY_OBJECT, Constraint, constraint_of

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}}
TEXT = '{"type":"object","properties":{"b":{"type":"string"},"a":{}}}'


def constraint(**fields: Any) -> Constraint | None:
    request = parse(CompletionRequest, json.dumps({"model": "m", "prompt": "p", **fields}).encode())
    return constraint_of(request.response_format, request.structured_outputs, {})


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", **fields}}


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json", ANY_OBJECT),
        ({"response_format": json_schema(schema=SCHEMA, strict=True, description="d")}, "json", TEXT),
        ({"response_format": json_schema(schema=SCHEMA, strict=None)}, "json", TEXT),
        ({"response_format": json_schema()}, "json", ANY_OBJECT),
        ({"structured_outputs": {"json": SCHEMA}}, "json", TEXT),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, "json", TEXT),
        ({"structured_outputs": {"json_object": True}}, "json", ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["é", "b"]}, "response_format": {"type": "text"}}, "choice", '["é","b"]'),
        ({"structured_outputs": {"grammar": 'root ::= "a"', "json_object": False}}, "grammar", 'root ::= "a"'),
    ],
)
def test_each_form_is_one_grammar_with_properties_in_the_order_given(
    fields: dict[str, Any], kind: str, source: str
) -> None:
    made = constraint(**fields)
    assert made is not None
    assert (made.grammar.kind, made.grammar.source, made.grammar.after) == (kind, source, None)
    assert made.field.startswith(("response_format", "structured_outputs"))


def test_no_form_and_the_form_text_are_no_grammar() -> None:
    assert constraint() is None
    assert constraint(response_format={"type": "text"}) is None
    assert constraint(response_format=None, structured_outputs=None) is None


def test_how_json_is_to_look_is_written_into_the_schema() -> None:
    def guidance(**how: Any) -> Any:
        made = constraint(structured_outputs={"json": SCHEMA, **how})
        assert made is not None
        return json.loads(made.grammar.source).get("x-guidance")

    assert guidance() is None
    assert guidance(disable_any_whitespace=True) == {"whitespace_flexible": False, "whitespace_pattern": None}
    assert guidance(whitespace_pattern=" ?") == {"whitespace_flexible": False, "whitespace_pattern": " ?"}


def test_objects_are_closed_on_request_where_the_schema_does_not_say() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"properties": {}}, "b": {"properties": {}, "additionalProperties": True}},
        "anyOf": [{"patternProperties": {"^x": {}}}, {"type": "string"}],
    }
    made = constraint(structured_outputs={"json": schema, "disable_additional_properties": True})
    assert made is not None
    assert json.loads(made.grammar.source) == {
        "type": "object",
        "properties": {
            "a": {"properties": {}, "additionalProperties": False},
            "b": {"properties": {}, "additionalProperties": True},
        },
        "anyOf": [{"patternProperties": {"^x": {}}, "additionalProperties": False}, {"type": "string"}],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "n"}}}, "response_format.json_schema"),
        ({"response_format": json_schema(schema="{}")}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(strict="yes")}, "response_format.json_schema.strict"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
         "response_format.json_schema.name"),
        ({"response_format": json_schema(schema={"a": "x" * MAX_GRAMMAR_CHARS})}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "["}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"backend": "xgrammar"}}, "structured_outputs.backend"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_and_the_field_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        constraint(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("how", [{}, {"disable_additional_properties": True}, {"disable_any_whitespace": True}])
@pytest.mark.parametrize("depth", [100, 400, 900])
def test_a_schema_of_any_depth_is_taken_or_refused(depth: int, how: dict[str, Any]) -> None:
    nested: dict[str, Any] = {}
    for _ in range(depth):
        nested = {"properties": {"a": nested}} if depth < 450 else {"a": nested}
    status = 200
    try:
        constraint(structured_outputs={"json": nested, **how})
    except ApiError as error:
        status = error.status
    assert status in (200, 400)


def test_a_constraint_says_where_it_came_from() -> None:
    assert constraint(structured_outputs={"regex": "a"}) == Constraint(
        Grammar("regex", "a"), "structured_outputs.regex"
    )
