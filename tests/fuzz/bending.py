"""Changes to a valid body. Those of `harmless` leave it valid, those of `harmful` may or may not."""

from __future__ import annotations

import json
import random
from typing import Any, Final

from fuzz import junk
from fuzz.bodies import ROUTES, Bodies
from fuzz.spoiling import spoiled

NUMBERS: Final = ("temperature", "top_p", "top_k", "seed", "min_p")  # any valid one leaves a body valid
DEEP: Final = 3000  # levels of nesting


def harmless(chance: random.Random, bodies: Bodies, path: str, body: dict[str, Any]) -> bytes:
    """The same request in other clothes, or another valid one."""
    body = dict(body)
    kind = ROUTES[path]
    for _ in range(chance.randint(1, 3)):
        match chance.randrange(5):
            case 0:
                names = [name for name in kind.model_fields if name not in body and name not in ("prompt", "messages")]
                if names:
                    body[chance.choice(names)] = None  # not given
            case 1 if (pair := bodies.neutral(path)) is not None:
                body[pair[0]] = pair[1]
            case 2:
                name = chance.choice(("user", "safety_identifier"))
                if name in kind.model_fields:
                    body[name] = junk.text(chance, 20)
            case 3:
                items = list(body.items())
                chance.shuffle(items)
                body = dict(items)
            case _:
                numbers = [name for name in NUMBERS if name in kind.model_fields]
                if numbers:
                    name = chance.choice(numbers)
                    body[name] = bodies.field(kind, name)
    text = json.dumps(
        body,
        ensure_ascii=chance.random() < 0.5,
        indent=chance.choice((None, None, 0, 3, "\t")),
        separators=chance.choice((None, (",", ":"), (" , ", " : "))),
    )
    if chance.random() < 0.2:
        text = " \r\n\t" + text + "\n "
    return text.encode()


def harmful(chance: random.Random, bodies: Bodies, path: str, body: dict[str, Any]) -> bytes:
    """One or two things about it are odd."""
    changed: Any = body
    for _ in range(chance.randint(1, 2)):
        changed = _bent(chance, bodies, path, changed)
    text = json.dumps(changed, ensure_ascii=chance.random() < 0.5)
    match chance.randrange(8):
        case 0:
            return spoiled(chance, text.encode())
        case 1:
            return text.encode(chance.choice(("utf-8-sig", "utf-16", "latin-1", "utf-32")), "replace")
        case 2 if text.endswith("}") and body:
            again = json.dumps({chance.choice(list(body)): junk.scalar(chance)})
            return (text[:-1] + ", " + again[1:]).encode()  # a key twice
        case 3:
            odd = chance.choice(("NaN", "1e999", "-Infinity", "1" * 5000, "\\ud800", "[" * DEEP + "]" * DEEP, "0x10"))
            return text.replace(": ", f': {odd}, "x": ', 1).encode()
        case _:
            return text.encode()


def _bent(chance: random.Random, bodies: Bodies, path: str, body: Any) -> Any:
    """One change somewhere in the tree."""
    if isinstance(body, dict) and body:
        name = chance.choice(list(body))
        match chance.randrange(7):
            case 0:
                return {key: value for key, value in body.items() if key != name}
            case 1:
                return {**body, junk.scalar_key(chance): junk.value(chance)}
            case 2:
                return {**body, name: body[chance.choice(list(body))]}
            case 3:
                field = chance.choice(list(ROUTES[path].model_fields))
                return {**body, field: junk.value(chance)}
            case 4:
                field = chance.choice(list(ROUTES[path].model_fields))
                return {**body, field: bodies.field(ROUTES[path], field)}
            case 5:
                return {**body, name: _bent(chance, bodies, path, body[name])}
            case _:
                return {**body, name: junk.value(chance)}
    if isinstance(body, list) and body:
        place = chance.randrange(len(body))
        match chance.randrange(4):
            case 0:
                return body[:place]
            case 1:
                return body * chance.choice((2, 50))
            case _:
                return [*body[:place], _bent(chance, bodies, path, body[place]), *body[place + 1 :]]
    if isinstance(body, str) and chance.random() < 0.5:
        return body + chance.choice(junk.STRINGS)
    if isinstance(body, int | float) and not isinstance(body, bool) and chance.random() < 0.5:
        return chance.choice((-body, body + 1, body - 1, body * 2, float(body), str(body)))
    return junk.value(chance)
