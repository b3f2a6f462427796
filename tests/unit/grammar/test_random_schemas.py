"""Whatever the schema and whatever the model wants to say: what comes out is an instance of the schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_worker import EOS, text_of
from unit.grammar.conftest import VOCAB_SIZE

from kvferry.engine.sampling.sampler import draw
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.schedule.step import Draw
from kvferry.wire.sampling import Grammar, Sampling

MAX_TOKENS = 6000  # everything that is generated below ends long before
NAMES = ["a", "b", "name", "päth", "x y"]


def bounded(kind: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(values, values).map(lambda ends: {"type": kind, "minimum": min(ends), "maximum": max(ends)})


LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}]),
    bounded("integer", st.integers(-5000, 5000)),
    bounded("number", st.integers(-20, 20)),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, st.integers(0, 3),
              st.integers(0, 5)),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-z]{2,4}(-[0-9]+)?$", "maxLength": 9},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "ipv4"},
        ]
    ),
    st.lists(st.one_of(st.integers(-3, 3), st.text(max_size=4), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"const": {"k": [1, "v"]}}, {"$ref": "#/$defs/leaf"}]),
)  # fmt: skip


def objects(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], required: int, extra: Any) -> dict[str, Any]:
        names = list(properties)
        return {"type": "object", "properties": properties, "required": names[:required], "additionalProperties": extra}

    extra = st.sampled_from([False, False, {"type": "integer", "minimum": 0, "maximum": 9}])
    return st.builds(build, st.dictionaries(st.sampled_from(NAMES), parts, max_size=4), st.integers(0, 4), extra)


def arrays(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        parts, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip


SCHEMAS = st.recursive(
    LEAVES,
    lambda parts: st.one_of(
        objects(parts), arrays(parts), st.lists(parts, min_size=1, max_size=3).map(lambda them: {"anyOf": them})
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(SCHEMAS, st.integers(0, 2**32))
def test_every_text_is_an_instance_of_its_schema(compiler: GrammarCompiler, schema: dict[str, Any], seed: int) -> None:
    schema = {**schema, "$defs": {"leaf": {"type": "boolean"}}}
    rng = np.random.default_rng(seed)
    mask = compiler.follow(Grammar("json", json.dumps(schema)), np.empty(0, np.uint32))
    sampling, tokens = Sampling(temperature=1.5, seed=seed), np.empty(MAX_TOKENS, np.uint32)
    for index in range(MAX_TOKENS):
        mask.advance(tokens[:index])
        token = draw(rng.normal(0, 2, VOCAB_SIZE).astype(np.float32), Draw(sampling, 0, index, mask=mask))
        assert mask.fault is None
        if token == EOS:
            break
        tokens[index] = token
    else:
        raise AssertionError("it never ended: " + text_of(tokens.tolist())[-100:])
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    checker.validate(json.loads(text_of(tokens[:index].tolist())))
