"""Bus and data-plane messages from chance: any valid one of a union, read off the message types themselves.

Where a field's name says that it is an id, it is most often one that lives (`Ids`): an id that nobody knows is
refused at the first look-up, and what lies behind that is what wants to be tried.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import numpy as np
from fuzz import junk
from msgspec import inspect

from kvferry.wire.codec import Message
from kvferry.wire.fields import pack_tokens
from kvferry.wire.tokens import PromptLogprobColumns

LIVE: Final = 0.7  # probability that an id is a live one
ODD: Final = 0.15  # that a number is at a bound of its type
NAMES_OF_ITEMS: Final = {
    "indices": "index", "streams": "stream_id", "prompt": "token", "generated": "token", "live": "incarnation",
    "scored": "stream_id",
}  # fmt: skip
U64: Final = (1 << 64) - 1
COLUMNS: Final = ("stream_ids", "indices", "tokens", "prompt", "generated", "rows", "counts", "top_tokens")


@dataclass
class Ids:
    """What lives now, by the name of the field that holds it."""

    known: dict[str, list[Any]] = field(default_factory=dict)

    def note(self, name: str, *values: Any) -> None:
        kept = self.known.setdefault(name, [])
        kept += [value for value in values if value not in kept]
        del kept[:-40]


class Messages:
    """Makes messages from one source of chance."""

    def __init__(self, chance: random.Random, ids: Ids) -> None:
        self._chance = chance
        self._ids = ids
        self._kinds: dict[type[Message], inspect.Type] = {}

    def any_of(self, union: Any) -> Any:
        """A valid message of one of these types."""
        kind = self._chance.choice(get_args(union) or (union,))
        if kind not in self._kinds:
            self._kinds[kind] = inspect.type_info(kind)
        return self._of(self._kinds[kind], "")

    def _of(self, kind: inspect.Type, name: str) -> Any:
        chance = self._chance
        known = self._ids.known.get(name)
        if known and chance.random() < LIVE:
            return chance.choice(known)
        match kind:
            case inspect.StructType():
                fields = {made.name: self._of(made.type, made.name) for made in kind.fields if self._given(made)}
                size = chance.randrange(4)
                if kind.cls is PromptLogprobColumns and chance.random() < 0.9:
                    num_top = chance.randrange(3)
                    for column, width in (("ranks", 1), ("top_tokens", num_top), ("logprobs", 1 + num_top)):
                        fields[column] = chance.randbytes(4 * width * (1 + size))
                for column in ("stream_ids", "indices", "tokens"):  # of one length, or nothing is taken
                    if column in fields and len(fields) > 3 and chance.random() < 0.9:
                        fields[column] = self._column(column, size)
                return kind.cls(**fields)
            case inspect.IntType():
                low, high = kind.ge if kind.ge is not None else -(1 << 63), kind.le if kind.le is not None else U64
                return self._number(low, high)
            case inspect.FloatType():
                low = kind.ge if kind.ge is not None else kind.gt if kind.gt is not None else -1e9
                high = kind.le if kind.le is not None else 1e9
                if chance.random() < ODD:
                    odd = [low, high, 1e-9, 1e308, float("inf")]
                    return chance.choice([x for x in odd if low < x <= high] or [high])
                return chance.uniform(low, min(high, low + 10.0)) or high
            case inspect.BytesType():
                if name in COLUMNS:
                    return self._column(name, chance.randrange(4))
                low = kind.min_length or 0
                return chance.randbytes(low if kind.max_length == low else chance.randint(low, low + 24))
            case inspect.StrType():
                return (chance.choice(junk.STRINGS) if chance.random() < ODD else junk.text(chance, 6))[
                    : kind.max_length
                ]
            case inspect.VarTupleType():
                return tuple(self._of(kind.item_type, _singular(name)) for _ in range(chance.randrange(4)))
            case inspect.TupleType():
                first, *others = kind.item_types
                return (self._of(first, _singular(name)), *(self._of(item, "") for item in others))
            case inspect.DictType():
                return {self._of(kind.key_type, "gateway"): self._of(kind.value_type, "") for _ in range(2)}
            case inspect.LiteralType():
                return chance.choice(kind.values)
            case inspect.BoolType():
                return chance.random() < 0.5
            case inspect.NoneType():
                return None
            case inspect.UnionType():
                return self._of(chance.choice(kind.types), name)
            case _:
                raise TypeError(f"no values for {kind}")

    def _given(self, made: inspect.Field) -> bool:
        return bool(made.required) or self._chance.random() < 0.7

    def _number(self, low: int, high: int) -> int:
        if self._chance.random() < ODD:
            return self._chance.choice((low, high, max(low, 0)))
        return self._chance.randint(max(low, -3), min(high, 40))

    def _column(self, name: str, size: int) -> bytes:
        singular = _singular(name)
        known: Sequence[int] = self._ids.known.get(singular) or (0,)
        numbers = [
            self._chance.choice(known) if singular in self._ids.known and self._chance.random() < LIVE
            else self._number(0, (1 << 32) - 1)
            for _ in range(size)
        ]  # fmt: skip
        column = pack_tokens(np.asarray(numbers, dtype=np.uint32))
        return column[:-1] if column and self._chance.random() < 0.03 else column


def _singular(name: str) -> str:
    return NAMES_OF_ITEMS.get(name, name.removesuffix("s"))
