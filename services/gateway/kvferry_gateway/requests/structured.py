"""Structured output: `response_format` as OpenAI has it, `structured_outputs` as vLLM has it, and what they make of
a request: one grammar, which is compiled here once before any worker hears of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import Field, ValidationError, model_validator

from kvferry.grammar.compiler import GrammarCompiler, GrammarError
from kvferry.lane import Lane
from kvferry.wire.sampling import MAX_GRAMMAR_CHARS, Grammar, GrammarKind
from kvferry_gateway.errors import bad_request
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.structural_tag import NewerForm, OlderForm, grammar_of_tags
from kvferry_gateway.requests.tagged import Special

MAX_CHOICE_TEXTS: Final = 1024
ANY_OBJECT: Final = '{"type":"object"}'

Source = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Schema = dict[str, Any]


class JsonSchemaFormat(RequestModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)] | None = None
    json_schema: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None  # the schema holds in either case


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise bad_request(
                "'response_format.json_schema' belongs to the type 'json_schema'.", "response_format.json_schema"
            )
        return self


class StructuredOutputs(RequestModel):
    """Exactly one of the first six; the others say how JSON is to look."""

    json_schema: Source | Schema | None = Field(default=None, alias="json")
    regex: Source | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)] | None = None
    grammar: Source | None = None
    json_object: bool | None = None
    structural_tag: str | Schema | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: Source | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        asked = (
            self.json_schema, self.regex, self.choice, self.grammar, self.json_object or None, self.structural_tag,
        )  # fmt: skip
        if sum(part is not None for part in asked) != 1:
            raise bad_request(
                "'structured_outputs' needs exactly one of 'json', 'regex', 'choice', 'grammar', 'json_object' and "
                "'structural_tag'.",
                "structured_outputs", "invalid_value",
            )  # fmt: skip
        return self


@dataclass(frozen=True, slots=True)
class Constraint:
    """A request's grammar, and the field that it came from, for errors."""

    grammar: Grammar
    field: str


def constraint_of(
    response_format: ResponseFormat | None, outputs: StructuredOutputs | None, special: Special
) -> Constraint | None:
    """`special`: tokens of the model. None: any text will do. Raises `ApiError` 400."""
    formatted = None if response_format is None else _formatted(response_format)
    if outputs is None:
        return formatted
    if formatted is not None:
        raise bad_request("'response_format' and 'structured_outputs' exclude each other.", "structured_outputs")
    return _asked(outputs, special)


def _formatted(response_format: ResponseFormat) -> Constraint | None:
    match response_format.type:
        case "text":
            return None
        case "json_object":
            return Constraint(Grammar("json", ANY_OBJECT), "response_format")
        case "json_schema":
            field = "response_format.json_schema.schema"
            assert response_format.json_schema is not None
            schema = response_format.json_schema.json_schema
            return _constraint("json", ANY_OBJECT if schema is None else _encoded(schema, field), field)


def _asked(outputs: StructuredOutputs, special: Special) -> Constraint:
    if outputs.structural_tag is not None:
        return _tagged(outputs.structural_tag, special)
    if outputs.regex is not None:
        return _constraint("regex", outputs.regex, "structured_outputs.regex")
    if outputs.choice is not None:
        field = "structured_outputs.choice"
        return _constraint("choice", _encoded(outputs.choice, field), field)
    if outputs.grammar is not None:
        return _constraint("grammar", outputs.grammar, "structured_outputs.grammar")
    field = "structured_outputs.json_object" if outputs.json_object else "structured_outputs.json"
    given = ANY_OBJECT if outputs.json_schema is None else outputs.json_schema
    schema = _decoded(given, field) if isinstance(given, str) else given
    if outputs.disable_additional_properties:
        schema = _unless_nested_too_deep(lambda: _closed(schema), field)
    if outputs.disable_any_whitespace or outputs.whitespace_pattern is not None:
        # Named in the schema, so that a worker needs nothing else.
        pattern = None if outputs.disable_any_whitespace else outputs.whitespace_pattern
        schema = {**schema, "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": pattern}}
    return _constraint("json", _encoded(schema, field), field)


def _tagged(given: str | Schema, special: Special) -> Constraint:
    field = "structured_outputs.structural_tag"
    tag = _decoded(given, field) if isinstance(given, str) else given
    try:
        form = (NewerForm if "format" in tag else OlderForm).model_validate(tag)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, (field, *problem["loc"])))
        raise bad_request(f"'{where}' is not supported: {problem['msg']}.", field, "unsupported_value") from None
    grammar = grammar_of_tags(form, special, field)
    return _constraint(grammar.kind, grammar.source, field)


def _constraint(kind: GrammarKind, source: str, field: str) -> Constraint:
    if len(source) > MAX_GRAMMAR_CHARS:
        raise bad_request(f"'{field}' has more than {MAX_GRAMMAR_CHARS} characters.", field, "invalid_value")
    return Constraint(Grammar(kind, source), field)


def _encoded(value: Any, field: str) -> str:
    encoded: bytes = _unless_nested_too_deep(lambda: msgspec.json.encode(value), field)
    return encoded.decode()


def _decoded(text: str, field: str) -> Schema:
    try:
        schema = _unless_nested_too_deep(lambda: msgspec.json.decode(text), field)
    except msgspec.DecodeError as error:
        raise bad_request(f"'{field}' is not valid JSON: {error}", field, "invalid_value") from None
    if not isinstance(schema, dict):
        raise bad_request(f"'{field}' is not a JSON object.", field, "invalid_value")
    return schema


def _unless_nested_too_deep(call: Callable[[], Any], field: str) -> Any:
    try:
        return call()
    except RecursionError:
        raise bad_request(f"'{field}' is nested too deeply.", field, "invalid_value") from None


def _closed(part: Any) -> Any:
    """Objects have no properties but those that the schema names, where it does not say otherwise."""
    if isinstance(part, list):
        return [_closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    closed = {key: _closed(value) for key, value in part.items()}
    if ("properties" in part or "patternProperties" in part) and "additionalProperties" not in part:
        closed["additionalProperties"] = False
    return closed


class GrammarCheck:
    """Compiles grammars off the event loop, one after the other."""

    def __init__(self, compiler: GrammarCompiler, lane: Lane) -> None:
        self._compiler = compiler
        self._lane = lane

    async def check(self, constraint: Constraint) -> None:
        """Raises `ApiError` 400 for a grammar that no worker could follow."""
        try:
            await self._lane.run(self._compiler.check, constraint.grammar)
        except GrammarError as error:
            raise bad_request(
                f"'{constraint.field}' can't be used: {error.reason}", constraint.field, "invalid_value"
            ) from None

    def close(self) -> None:
        self._lane.close()
