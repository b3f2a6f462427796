"""Valid request bodies, read off the pydantic models: a new field is covered without a line here.

What a model cannot say (which model is served, which tokens there are, how much is worth generating) stands in
`KNOWN`.
"""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from fuzz import junk
from pydantic.fields import FieldInfo
from scripted_worker import VOCAB_SIZE

from kvferry_gateway.body import NEUTRAL, parse
from kvferry_gateway.errors import ApiError
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.requests.request_model import RequestModel
from kvferry_gateway.requests.responses import ResponsesRequest
from kvferry_gateway.tokenize import DetokenizeRequest, TokenizeRequest

MODEL: Final = "memory"
ROUTES: Final[Mapping[str, type[RequestModel]]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
WEIGHTS: Final = (5, 5, 3, 1, 1)
GIVEN: Final = 0.15  # probability that an optional field is given

Make = Callable[[random.Random], Any]


def _tokens(chance: random.Random) -> list[int]:
    return [chance.randrange(VOCAB_SIZE) for _ in range(chance.randint(1, 40))]


def _prompt(chance: random.Random) -> Any:
    match chance.randrange(5):
        case 0:
            return _tokens(chance)
        case 1:
            return [_tokens(chance) for _ in range(chance.randint(1, 2))]
        case 2:
            return [junk.text(chance, chance.randint(1, 20)) for _ in range(chance.randint(1, 2))]
        case _:
            return junk.text(chance, chance.randint(1, 80))


def _structural_tag(chance: random.Random) -> Any:
    mark = chance.choice(("<", "<|end|>", junk.text(chance, 3) or "a"))
    schema = chance.choice(({"type": "integer"}, {}, {"enum": ["a", 1]}, junk.value(chance, 2)))
    return {
        "structures": [{"begin": mark + junk.text(chance, 2), "schema": schema, "end": junk.text(chance, 2)}],
        "triggers": [chance.choice((mark, "<", junk.text(chance, 2)))],
    }


KNOWN: Final[Mapping[str, Make]] = {
    "model": lambda chance: MODEL,
    "prompt": _prompt,
    "max_tokens": lambda chance: chance.randint(0, 12),
    "max_completion_tokens": lambda chance: chance.randint(1, 12),
    "max_output_tokens": lambda chance: chance.randint(1, 12),
    "input": lambda chance: junk.text(chance, chance.randint(1, 40)),
    "min_tokens": lambda chance: chance.randint(0, 4),
    "n": lambda chance: chance.choice((1, 1, 1, 2, 3)),
    "best_of": lambda chance: chance.randint(1, 4),
    "structural_tag": _structural_tag,
    "stop_token_ids": lambda chance: _tokens(chance)[:3],
    "tokens": _tokens,
    "logit_bias": lambda chance: {str(chance.randrange(VOCAB_SIZE)): chance.uniform(-100, 100) for _ in range(2)},
    "chat_template_kwargs": lambda chance: {"flavour": junk.scalar(chance)},
}
ALWAYS: Final = ("model", "max_tokens", "max_output_tokens")  # so that nothing generates for long


class Bodies:
    """Makes valid bodies of all routes from one source of chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def route(self) -> str:
        return self._chance.choices(list(ROUTES), WEIGHTS)[0]

    def valid(self, path: str) -> dict[str, Any]:
        """A body that the route's model takes."""
        kind = ROUTES[path]
        while True:
            body = self.fields(kind)
            if path == "/tokenize":
                body.pop(self._chance.choice(("prompt", "messages")), None)
                if isinstance(body.get("prompt"), list):
                    body["prompt"] = "text"
            try:
                parse(kind, msgspec.json.encode(body))
            except ApiError:
                continue  # two fields that don't go together
            return body

    def fields(self, kind: type[RequestModel]) -> dict[str, Any]:
        made = {}
        for name, info in kind.model_fields.items():
            if info.is_required() or name in ALWAYS or self._chance.random() < GIVEN:
                made[info.alias or name] = self.field(kind, name)
        return made

    def field(self, kind: type[RequestModel], name: str) -> Any:
        """A valid value of one field."""
        if (known := KNOWN.get(name)) is not None:
            return known(self._chance)
        info = kind.model_fields[name]
        return self._of(info.annotation, info.metadata)

    def neutral(self, path: str) -> tuple[str, Any] | None:
        """A field that is known, not built, and accepted because its value does nothing."""
        fields = NEUTRAL.get(ROUTES[path])
        if not fields:
            return None
        candidates = (None, 1, True, False, 0, [], "", "auto", "none", ["text"], {"type": "text"})
        name = self._chance.choice(list(fields))
        return name, self._chance.choice([value for value in candidates if value is None or fields[name](value)])

    def _of(self, kind: Any, limits: Sequence[Any] = ()) -> Any:
        """A value of an annotation within its constraints."""
        chance, origin = self._chance, get_origin(kind)
        if origin is Annotated:
            inner, *more = get_args(kind)
            flat = [limit for one in more for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
            return self._of(inner, flat)
        if origin is Literal:
            return chance.choice(get_args(kind))
        if origin in (Union, types.UnionType):
            return self._of(chance.choice(get_args(kind)))
        if origin is list:
            low, high = _bound(limits, "min_length", 0), min(3, _bound(limits, "max_length", 3))
            return [self._of(get_args(kind)[0]) for _ in range(chance.randint(low, max(low, high)))]
        if origin is dict:
            key, item = get_args(kind)
            return {self._of(key): self._of(item) for _ in range(chance.randrange(3))}
        if kind is type(None):
            return None
        if isinstance(kind, type) and issubclass(kind, RequestModel):
            return self.fields(kind)
        if kind is bool:
            return chance.random() < 0.5
        if kind is str and any(getattr(limit, "pattern", None) for limit in limits):
            return f"name_{chance.randrange(9)}"  # the patterns here are of names
        if kind is str:
            low, high = _bound(limits, "min_length", 0), min(12, _bound(limits, "max_length", 12))
            return junk.text(chance, chance.randint(low, high))
        if kind is int:
            low = _bound(limits, "ge", -(1 << 40))
            high = min(_bound(limits, "le", 1 << 40), _bound(limits, "lt", (1 << 40) + 1) - 1)
            return chance.choice((low, high, chance.randint(low, high), min(high, low + chance.randrange(20))))
        if kind is float:
            low, high = _bound(limits, "ge", _bound(limits, "gt", 0.0) + 1e-6), _bound(limits, "le", 100.0)
            return chance.choice((low, high, chance.uniform(low, high)))
        if kind is Any:
            return junk.value(chance, 2)
        raise TypeError(f"no values for {kind}")


N = TypeVar("N", int, float)


def _bound(limits: Sequence[Any], name: str, default: N) -> N:
    found = [getattr(limit, name) for limit in limits if getattr(limit, name, None) is not None]
    return found[0] if found else default
