"""Hypothesis strategies and bad values, both read off the message types themselves.

A new message or field is therefore covered without a line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

MAX_LENGTH = 20  # of generated strings and sequences, where the type allows more
FAR = (1 << 64) - 1  # the largest integer that msgpack carries

Path = tuple[int | str, ...]  # into the decoded array: positions, and keys of maps


def messages(*types: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any valid message of these types."""
    return st.one_of(*(_strategy(inspect.type_info(made)) for made in types))


def _strategy(kind: inspect.Type) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.StructType():
            fields = {field.name: _strategy(field.type) for field in kind.fields}
            return st.builds(kind.cls, **fields)
        case inspect.IntType():
            low = kind.ge if kind.ge is not None else -(1 << 63)
            high = kind.le if kind.le is not None else FAR
            return st.integers(low, high)
        case inspect.FloatType():
            return st.floats(
                min_value=kind.ge if kind.ge is not None else kind.gt,
                max_value=kind.le,
                exclude_min=kind.gt is not None,
                allow_nan=False,
            )
        case inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=kind.min_length or MAX_LENGTH)
        case inspect.StrType():
            letters = st.characters(exclude_categories=["Cs"])  # no surrogates: they are no text
            return st.text(letters, max_size=min(kind.max_length or MAX_LENGTH, MAX_LENGTH))
        case inspect.VarTupleType():
            return st.lists(_strategy(kind.item_type), max_size=min(kind.max_length or MAX_LENGTH, 5)).map(tuple)
        case inspect.TupleType():
            return st.tuples(*(_strategy(item) for item in kind.item_types))
        case inspect.DictType():
            return st.dictionaries(_strategy(kind.key_type), _strategy(kind.value_type), max_size=3)
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.UnionType():
            return st.one_of(*(_strategy(member) for member in kind.types))
        case _:
            raise TypeError(f"no strategy for {kind}")


def bad_values(kind: inspect.Type, value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, replacement) pairs, each of which makes the message invalid.

    `value` is a valid message in plain form (lists, maps, scalars), to walk along.
    """
    wrong_type: Any = object
    match kind:
        case inspect.StructType():
            first = 0
            if kind.tag is not None:
                first = 1
                yield (*path, 0), "no such tag"
                yield (*path, 0), None
            for place, field in enumerate(kind.fields, start=first):
                yield from bad_values(field.type, value[place], (*path, place))
            if path:
                yield path, {}
                if num_required := sum(field.required for field in kind.fields):
                    yield path, value[: first + num_required - 1]
            return
        case inspect.IntType():
            wrong_type = "text"
            yield path, 1.5
            if kind.ge is not None:
                yield path, kind.ge - 1
            if kind.le is not None:
                yield path, kind.le + 1
        case inspect.FloatType():
            wrong_type = "text"
            if kind.ge is not None:
                yield path, kind.ge - 1.0
                yield path, float("-inf")
            if kind.gt is not None:
                yield path, kind.gt
            if kind.le is not None:
                yield path, kind.le * 1.01 + 1
                yield path, float("inf")
        case inspect.BytesType():
            wrong_type = "text"
            if kind.min_length:
                yield path, bytes(kind.min_length - 1)
            if kind.max_length is not None:
                yield path, bytes(kind.max_length + 1)
        case inspect.StrType():
            wrong_type = b"bytes"
            if kind.max_length is not None:
                yield path, "x" * (kind.max_length + 1)
        case inspect.VarTupleType():
            wrong_type = 7
            if kind.max_length is not None and value:
                yield path, [value[0]] * (kind.max_length + 1)
            if value:
                yield from bad_values(kind.item_type, value[0], (*path, 0))
        case inspect.TupleType():
            wrong_type = 7
            yield path, value[:-1]
            yield path, [*value, value[-1]]
            for place, item in enumerate(kind.item_types):
                yield from bad_values(item, value[place], (*path, place))
        case inspect.DictType():
            wrong_type = [1]
            if value:
                key = next(iter(value))
                yield from bad_values(kind.value_type, value[key], (*path, key))
            if kind.max_length is not None and value:
                yield path, {str(number): value[key] for number in range(kind.max_length + 1)}
        case inspect.LiteralType():
            wrong_type = 7
            yield path, "no such choice"
        case inspect.BoolType():
            wrong_type = 1
        case inspect.UnionType():  # an optional field: the sample holds the other type
            member = next(member for member in kind.types if not isinstance(member, inspect.NoneType))
            if value is not None:
                yield from (bad for bad in bad_values(member, value, path) if bad[1] is not None)
            return
        case _:
            raise TypeError(f"no bad values for {kind}")
    yield path, wrong_type
    yield path, None


def replaced(value: Any, path: Path, replacement: Any) -> Any:
    """A copy of a plain value with one place changed."""
    if not path:
        return replacement
    head, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[head] = replaced(value[head], tuple(rest), replacement)
    return copy
