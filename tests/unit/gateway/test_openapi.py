"""The OpenAPI document tells every route and every field."""

from __future__ import annotations

import re
from pathlib import Path

from kvferry_gateway.field_meanings import MEANINGS
from kvferry_gateway.openapi import OPERATIONS, document, request_models

APP = Path(__file__).parents[3] / "services" / "gateway" / "kvferry_gateway" / "app.py"


def test_every_route_is_told_with_its_method_and_whether_it_needs_a_key() -> None:
    told = {(op.path, op.method.upper(), op.needs_key) for op in OPERATIONS if "{" not in op.path}
    text = APP.read_text().replace("MODELS: _Route", '"/v1/models": _Route')
    routes = re.findall(r'"(/[\w./]+)": _Route\("(\w+)", self\.\w+, "(\w+)"(?:, traced=True)?\)', text)
    assert told == {(path, method, access != "open") for path, method, access in routes}


def test_every_field_has_a_meaning_and_every_meaning_a_field() -> None:
    made = document("0")
    fields = set()
    for model in request_models():
        schema = made["components"]["schemas"][model.__name__]
        assert set(schema["properties"]) == {info.alias or name for name, info in model.model_fields.items()}
        assert all(shown["description"] for shown in schema["properties"].values())
        fields |= set(schema["properties"]) | {f"{model.__name__}.{field}" for field in model.model_fields}
    assert set(MEANINGS) <= fields


def test_every_reference_leads_somewhere() -> None:
    made = document("0")
    for name in re.findall(r"'#/components/schemas/(\w+)'", str(made)):
        assert name in made["components"]["schemas"]
