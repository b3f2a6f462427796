"""The document at `/openapi.json` is true: schemathesis draws requests from it, the real application answers them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted_worker import Cluster

from kvferry_gateway.openapi import OPERATIONS

pytestmark = pytest.mark.usefixtures("no_leaks")

CHECKS: list[Any] = [status_code_conformance, content_type_conformance, response_schema_conformance]
PATIENCE_S = 60.0


def draw(document: dict[str, Any], url: str, num_examples: int) -> dict[str, set[int]]:
    """Ask every operation so often, half of the time against the document. Returns the answers' statuses by path."""
    statuses: dict[str, set[int]] = {}
    schema = schemathesis.openapi.from_dict(document)
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):

            @settings(
                max_examples=num_examples, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                response = case.call(base_url=url, timeout=PATIENCE_S)
                assert response.status_code != 500, case.as_curl_command()
                case.validate_response(response, checks=CHECKS)
                statuses.setdefault(case.operation.path, set()).add(response.status_code)

            one()
    return statuses


async def test_requests_drawn_from_the_document_are_answered_as_it_says(no_leaks: None, tmp_path: Path) -> None:
    async with Cluster(tmp_path, model_options={"max_context": 2048}, model_name="string") as cluster:
        await cluster.speaker("Grüße.", model="string", max_model_len=2048, num_blocks=256)
        document = (await cluster.client.get("/openapi.json")).json()
        # Names of models that are drawn are none of ours: nothing would come of it but 404.
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"const": "string"}
        statuses = await asyncio.to_thread(draw, document, cluster.url, 12)
    assert set(statuses) == {operation.path for operation in OPERATIONS}
    for operation in OPERATIONS:
        wanted = {400} if operation.request is not None else {404} if operation.parameters else {200}
        assert wanted <= statuses[operation.path], operation.path
    # Few of what is drawn for one operation are requests that make sense.
    assert any(200 in statuses[operation.path] for operation in OPERATIONS if operation.streams)
