"""JSON schemas as people send them, each with texts that are instances and texts that are not.

Modelled on the sources of JSONSchemaBench (function calls, configuration files, API objects, the draft's own test
suite), written anew. Every keyword that is common there has a case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    schema: Schema
    right: tuple[Any, ...]  # instances
    wrong: tuple[Any, ...]


def closed(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    names = list(properties) if required is None else required
    return {
        "type": "object", "properties": properties, "required": names, "additionalProperties": False, **more,
    }  # fmt: skip


TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer"}
PERSON: Final = closed({"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}})
TREE: Final[Schema] = {
    "$ref": "#/$defs/node",
    "$defs": {"node": closed({"value": WHOLE, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}})},
}
WORKFLOW: Final[Schema] = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "on": {"anyOf": [TEXT, {"type": "array", "items": TEXT}, {"type": "object"}]},
        "env": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
        "jobs": {
            "type": "object",
            "patternProperties": {
                "^[a-z_][a-z0-9_-]*$": closed(
                    {
                        "runs-on": {"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
                        "needs": {"type": "array", "items": TEXT},
                        "steps": {
                            "type": "array",
                            "items": {"anyOf": [closed({"uses": TEXT}), closed({"run": TEXT, "shell": TEXT}, ["run"])]},
                        },
                    },
                    ["runs-on", "steps"],
                )
            },
            "additionalProperties": False,
        },
    },
    "required": ["on", "jobs"],
}
DEPLOYMENT: Final = closed(
    {
        "apiVersion": {"const": "apps/v1"},
        "kind": {"enum": ["Deployment", "StatefulSet"]},
        "metadata": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]},
        "spec": closed(
            {
                "replicas": {"type": "integer", "minimum": 0, "maximum": 1000},
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": closed(
                        {
                            "image": {"type": "string", "pattern": "^[a-z0-9./-]+(:[a-zA-Z0-9._-]+)?$"},
                            "ports": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 65535}},
                        },
                        ["image"],
                    ),
                },
            }
        ),
    }
)


CASES: Final[tuple[Case, ...]] = (
    Case("flat object", PERSON, ({"name": "Ada", "age": 36},), ({"name": "Ada"}, {"name": 1, "age": 3})),
    Case("optional properties", closed({"a": WHOLE, "b": TEXT, "c": {"type": "null"}}, ["b"]),
         ({"b": "x"}, {"a": 1, "b": "x", "c": None}), ({"a": 1}, {"b": "x", "d": 1})),
    Case("open object", {"type": "object", "properties": {"a": WHOLE}, "required": ["a"]},
         ({"a": 1}, {"a": 1, "more": ["x"]}), ({"more": 1}, {"a": "1"})),
    Case("nested objects", closed({"who": PERSON, "at": closed({"city": TEXT, "zip": TEXT}, ["city"])}),
         ({"who": {"name": "A", "age": 1}, "at": {"city": "B"}},), ({"who": {"name": "A", "age": 1}, "at": {}},)),
    Case("array of objects", {"type": "array", "items": PERSON}, ([], [{"name": "A", "age": 1}] * 3),
         ([{"name": "A"}], {})),
    Case("bounded array", {"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 4}, ([1, 2], [1, 2, 3, 4]),
         ([1], [1, 2, 3, 4, 5])),
    Case("tuple", {"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "minItems": 2}, (["a", 1],),
         (["a"], [1, "a"], ["a", 1, 2])),
    Case("any object", {"type": "object"}, ({}, {"a": [1, {"b": None}]}), ([], 1)),
    Case("anything", {}, (1, "a", [None], {"a": 1.5e-3}), ()),
    Case("enum of texts", {"enum": ["red", "green", "blue"]}, ("red",), ("purple", 1)),
    Case("enum of kinds", {"enum": [1, "one", None, [1], {"a": 1}]}, (1, "one", None, [1], {"a": 1}), (2, [2])),
    Case("const", {"const": {"v": 1}}, ({"v": 1},), ({"v": 2},)),
    Case("large enum", {"enum": [f"country-{number:03d}" for number in range(250)]}, ("country-017",),
         ("country-250",)),
    Case("integer bounds", {"type": "integer", "minimum": -5, "maximum": 120}, (-5, 0, 120), (-6, 121, 1.5)),
    Case("exclusive bounds", {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}, (1, 9), (0, 10)),
    Case("number bounds", {"type": "number", "minimum": 0, "maximum": 1}, (0, 0.25, 1), (-0.5, 1.5)),
    Case("multipleOf", {"type": "integer", "multipleOf": 5}, (0, 5, 125), (3, 12)),
    Case("text lengths", {"type": "string", "minLength": 2, "maxLength": 4}, ("ab", "äöü", "abcd"), ("a", "abcde")),
    Case("pattern", {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, ("AB-1234",), ("AB-123", "ab-1234")),
    Case("unanchored pattern", {"type": "string", "pattern": "[0-9]{2}"}, ("a12b",), ("a1b",)),
    Case("date-time", {"type": "string", "format": "date-time"}, ("2026-11-28T22:13:28Z",), ("yesterday",)),
    Case("date", {"type": "string", "format": "date"}, ("2026-02-28",), ("2026-2-28", "28.2.2026")),
    Case("time", {"type": "string", "format": "time"}, ("22:13:28Z",), ("22:13h",)),
    Case("email", {"type": "string", "format": "email"}, ("a.b@example.org",), ("a.b", "@example.org")),
    Case("uuid", {"type": "string", "format": "uuid"}, ("123e4567-e89b-12d3-a456-426614174000",), ("123e4567",)),
    Case("ipv4", {"type": "string", "format": "ipv4"}, ("192.168.0.1",), ("192.168.0", "300.1.1.1")),
    Case("uri", {"type": "string", "format": "uri"}, ("https://example.org/a?b=c",), ("no uri",)),
    Case("hostname", {"type": "string", "format": "hostname"}, ("a.example.org",), ("a_b!",)),
    Case("nullable", closed({"a": {"type": ["string", "null"]}}), ({"a": "x"}, {"a": None}), ({"a": 1},)),
    Case("anyOf", {"anyOf": [TEXT, WHOLE, PERSON]}, ("a", 1, {"name": "A", "age": 1}), (None, 1.5)),
    Case("oneOf of kinds", {"oneOf": [TEXT, WHOLE]}, ("a", 1), (None, [])),
    Case("oneOf with a discriminator", {"oneOf": [closed({"type": {"const": "cat"}, "lives": WHOLE}),
                                                  closed({"type": {"const": "dog"}, "tricks": TEXT})]},
         ({"type": "cat", "lives": 9}, {"type": "dog", "tricks": "sit"}), ({"type": "cat", "tricks": "sit"},)),
    Case("oneOf that overlaps", {"oneOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 7}]},
         (1, 9), (5,)),
    Case("allOf", {"allOf": [{"type": "object", "properties": {"a": WHOLE}, "required": ["a"]},
                             {"type": "object", "properties": {"b": TEXT}, "required": ["b"]}]},
         ({"a": 1, "b": "x"},), ({"a": 1}, {"b": "x"})),
    Case("allOf of bounds", {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 7}]}, (3, 7),
         (2, 8)),
    Case("$ref", {"$ref": "#/$defs/p", "$defs": {"p": PERSON}}, ({"name": "A", "age": 1},), ({"name": "A"},)),
    Case("recursion", TREE, ({"value": 1, "children": [{"value": 2, "children": []}]},),
         ({"value": 1, "children": [{"value": 2}]},)),
    Case("map", {"type": "object", "additionalProperties": WHOLE}, ({}, {"a": 1, "b": 2}), ({"a": "1"},)),
    Case("patternProperties", {"type": "object", "patternProperties": {"^x-": TEXT, "^n-": WHOLE},
                               "additionalProperties": False}, ({"x-a": "b", "n-a": 1},), ({"x-a": 1}, {"y": "b"})),
    Case("propertyNames", {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, ({"abc": 1},), ({"A1": 1},)),
    Case("minProperties", {"type": "object", "additionalProperties": WHOLE, "minProperties": 1, "maxProperties": 2},
         ({"a": 1}, {"a": 1, "b": 2}), ({}, {"a": 1, "b": 2, "c": 3})),
    Case("uniqueItems", {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True}, ([1, 2],), ([1, 1],)),
    Case("contains", {"type": "array", "contains": {"const": 1}}, ([2, 1],), ([2, 3],)),
    Case("dependentRequired", {"type": "object", "properties": {"a": WHOLE, "b": WHOLE},
                               "dependentRequired": {"a": ["b"]}}, ({"a": 1, "b": 2}, {}), ({"a": 1},)),
    Case("if then else", {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}, "n": WHOLE},
                          "required": ["kind"], "if": {"properties": {"kind": {"const": "a"}}},
                          "then": {"required": ["n"]}}, ({"kind": "a", "n": 1}, {"kind": "b"}), ({"kind": "a"},)),
    Case("not", {"type": "string", "not": {"enum": ["forbidden"]}}, ("allowed",), ("forbidden",)),
    Case("titles and examples", {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T",
                                 "description": "d", **closed({"a": {**TEXT, "title": "A", "default": "x",
                                                                     "examples": ["y"]}})}, ({"a": "z"},), ({},)),
    Case("function call", closed({"name": {"const": "get_weather"}, "arguments": closed(
        {"location": TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}, "days": {"type": "integer", "minimum": 1,
                                                                                 "maximum": 14}}, ["location"])}),
         ({"name": "get_weather", "arguments": {"location": "Paris, France", "unit": "celsius"}},),
         ({"name": "get_weather", "arguments": {"unit": "celsius"}},)),
    Case("chain of thought", closed({"steps": {"type": "array", "items": closed({"explanation": TEXT, "output": TEXT})},
                                     "final_answer": TEXT}),
         ({"steps": [{"explanation": "8x = -30, so x = -30 / 8.", "output": "x = -3.75"}], "final_answer": "-3.75"},),
         ({"steps": []},)),
    Case("workflow file", WORKFLOW, ({"name": "ci", "on": ["push"], "jobs": {"test": {
        "runs-on": "ubuntu-latest", "steps": [{"uses": "actions/checkout@v4"}, {"run": "make test"}]}}},),
         ({"on": "push", "jobs": {"test": {"steps": []}}}, {"on": "push"})),
    Case("deployment", DEPLOYMENT, ({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
                                     "spec": {"replicas": 3, "containers": [{"image": "nginx:1.27", "ports": [80]}]}},),
         ({"apiVersion": "v1", "kind": "Deployment", "metadata": {"name": "web"},
           "spec": {"replicas": 3, "containers": []}},)),
    Case("200 properties", closed({f"field_{number}": [TEXT, WHOLE, {"type": "boolean"}][number % 3]
                                   for number in range(200)}, ["field_0", "field_100"]),
         ({"field_0": "a", "field_7": 1, "field_100": 5},), ({"field_0": "a"}, {"field_0": 1, "field_100": 5})),
    Case("union of 60 events", {"anyOf": [closed({"event": {"const": f"event_{number}"}, f"value_{number}": WHOLE})
                                          for number in range(60)]},
         ({"event": "event_42", "value_42": 1},), ({"event": "event_42", "value_41": 1},)),
)  # fmt: skip
