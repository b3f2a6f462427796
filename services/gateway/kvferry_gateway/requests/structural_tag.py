"""`structural_tag` as vLLM takes it: free text, in which a trigger begins one of some tags with a schema inside.

{"structures": [{"begin", "schema", "end"}, …], "triggers": [text, …]}                               the older form
{"type": "structural_tag", "format": {"type": "triggered_tags", "triggers", "tags": [
    {"begin", "content": {"type": "json_schema", "json_schema"}, "end"}, …], "at_least_one", "stop_after_first"}}
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from kvferry.wire.sampling import Grammar
from kvferry_gateway.errors import bad_request
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.tagged import Special, TaggedText, between

MAX_TAGS: Final = 128
MAX_TAG_CHARS: Final = 1024

Mark = Annotated[str, Field(min_length=1, max_length=MAX_TAG_CHARS)]
End = Annotated[str, Field(max_length=MAX_TAG_CHARS)]
Triggers = Annotated[list[Mark], Field(min_length=1, max_length=MAX_TAGS)]


class Structure(RequestModel):
    begin: Mark
    json_schema: dict[str, Any] = Field(alias="schema")
    end: End


class OlderForm(RequestModel):
    type: Literal["structural_tag"] | None = None
    structures: Annotated[list[Structure], Field(min_length=1, max_length=MAX_TAGS)]
    triggers: Triggers


class Content(RequestModel):
    type: Literal["json_schema"]
    json_schema: dict[str, Any]


class Tag(RequestModel):
    type: Literal["tag"] | None = None
    begin: Mark
    content: Content
    end: End


class TriggeredTags(RequestModel):
    type: Literal["triggered_tags"]
    triggers: Triggers
    tags: Annotated[list[Tag], Field(min_length=1, max_length=MAX_TAGS)]
    at_least_one: bool = False
    stop_after_first: bool = False


class NewerForm(RequestModel):
    type: Literal["structural_tag"]
    format: TriggeredTags


def grammar_of_tags(given: OlderForm | NewerForm, special: Special, field: str) -> Grammar:
    """Raises `ApiError` 400 for a tag that no trigger begins."""
    if isinstance(given, OlderForm):
        tags = [(tag.begin, tag.json_schema, tag.end) for tag in given.structures]
        triggers, at_least_one, at_most_one = given.triggers, False, False
    else:
        tags = [(tag.begin, tag.content.json_schema, tag.end) for tag in given.format.tags]
        triggers = given.format.triggers
        at_least_one, at_most_one = given.format.at_least_one, given.format.stop_after_first
    text = TaggedText(special)
    bodies: dict[str, list[str]] = {}
    for begin, schema, end in tags:
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise bad_request(f"'{field}': no trigger begins the tag {begin!r}.", field, "invalid_value")
        body = (text.literal(begin[len(trigger) :]), text.schema(schema), text.literal(end))
        bodies.setdefault(trigger, []).append(" ".join(part for part in body if part))
    led = [f"{text.up_to(trigger)} ({' | '.join(found)})" for trigger, found in bodies.items()]
    return text.grammar(between(text.rule("tag", " | ".join(led)), at_least_one=at_least_one, at_most_one=at_most_one))
