"""The tables of `docs/api.md`, made from the OpenAPI document."""

from __future__ import annotations

from typing import Any

from kvferry_gateway.openapi import document, request_models


def api_tables() -> dict[str, str]:
    """Name of a table to its text: the routes, and the fields of each request."""
    made = document("0")
    schemas = made["components"]["schemas"]
    fields = {model.__name__: _fields(schemas[model.__name__], schemas) for model in request_models()}
    return {"routes": _routes(made["paths"]), **fields}


def _routes(paths: dict[str, Any]) -> str:
    rows = ["| route | body | answer | errors |", "|---|---|---|---|"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            name = body.get("$ref", "").rpartition("/")[2]
            events = " Also as events." if "text/event-stream" in operation["responses"]["200"]["content"] else ""
            errors = ", ".join(status for status in operation["responses"] if status != "200")
            request = f"`{name}`" if name else ""
            rows.append(f"| `{method.upper()} {path}` | {request} | {operation['summary']}{events} | {errors} |")
    return "\n".join(rows)


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    required = schema.get("required", [])
    for field, shown in schema["properties"].items():
        default = "required" if field in required else _value(shown["default"]) if shown.get("default") else ""
        rows.append(f"| `{field}` | {_kind(shown, schemas)} | {default} | {shown['description']} |")
    return "\n".join(rows)


def _value(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(shown: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in shown:
        name = shown["$ref"].rpartition("/")[2]
        properties = schemas[name].get("properties", {})
        return "{" + ", ".join(f"`{field}`" for field in properties) + "}"
    if options := shown.get("anyOf") or shown.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(option, schemas) for option in options if option != {"type": "null"}))
    if "enum" in shown:
        return ", ".join(f"`{value}`" for value in shown["enum"])
    if "const" in shown:
        return f"`{shown['const']}`"
    match shown.get("type"):
        case "array":
            return f"list of {_kind(shown['items'], schemas)}"
        case "object":
            inner = shown.get("additionalProperties")
            return f"object of {_kind(inner, schemas)}" if isinstance(inner, dict) else "object"
        case "integer" | "number" as kind:
            return " ".join((str(kind), _range(shown))).strip()
        case None:
            return "any"
        case kind:
            return str(kind)


def _range(shown: dict[str, Any]) -> str:
    low, above = shown.get("minimum"), shown.get("exclusiveMinimum")
    high, below = shown.get("maximum"), shown.get("exclusiveMaximum")
    if max(abs(bound) for bound in (low or above or 0, high or below or 0)) > 1 << 30:
        return ""  # the width of a number, no choice of ours
    parts = [f"≥ {low}" if low is not None else "", f"> {above}" if above is not None else ""]
    parts += [f"≤ {high}" if high is not None else "", f"< {below}" if below is not None else ""]
    return ", ".join(part for part in parts if part)
