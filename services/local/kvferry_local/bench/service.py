"""`kvferry bench` from its settings to its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import click

from kvferry.errors import KvferryError, SettingError
from kvferry_local.bench.client import Outcome, first_model
from kvferry_local.bench.endpoint import Endpoint, ServerError
from kvferry_local.bench.load import closed_loop, open_loop
from kvferry_local.bench.picture import picture
from kvferry_local.bench.prompts import prompt
from kvferry_local.bench.summary import Summary, text
from kvferry_local.bench.trace import read_trace
from kvferry_local.bench.workload import Planned, fitted, generated
from kvferry_local.client import RequestFailed, find_target
from kvferry_local.settings import BenchSettings
from kvferry_local.trust import trust

MODEL_TIMEOUT_S: Final = 10.0
DEFAULT_REQUESTS: Final = 100
NOT_WRITTEN: Final = {"api_key", "tls_ca", "url", "served_model_name", "run_file"}
PATHS: Final = {"chat": "/chat/completions", "completions": "/completions"}


def plan(settings: BenchSettings) -> list[Planned]:
    """Raises `SettingError`."""
    if settings.trace is None:
        count = settings.requests or DEFAULT_REQUESTS
        lengths = settings.prompt_tokens, settings.output_tokens
        return generated(settings.pattern, settings.rate or 1.0, count, *lengths, settings.seed)
    trace = read_trace(settings.trace)
    return fitted(trace, settings.requests, settings.rate, settings.speed, settings.length_scale)


def body_of(settings: BenchSettings, model: str, request: Planned, number: int) -> dict[str, Any]:
    words = prompt(request, number, settings.seed)
    asked: dict[str, Any] = {"model": model, "max_tokens": request.output_tokens, "temperature": 0.0}
    if settings.ignore_eos:
        asked["ignore_eos"] = True
    if settings.endpoint == "chat":
        return {**asked, "messages": [{"role": "user", "content": words}]}
    return {**asked, "prompt": words}


async def bench(settings: BenchSettings) -> bool:
    """Run the load, print and write what was asked for. Whether any request was answered whole.

    Raises `SettingError`, and `RequestFailed` if the endpoint does not even list its models.
    """
    for setting, file in (("--json", settings.json_file), ("--svg", settings.svg)):
        if file is not None and not file.absolute().parent.is_dir():
            raise SettingError(setting, f"{file.parent} is no directory")
    planned = plan(settings)
    target = find_target(settings)
    url, known_model = target.url, target.model
    tls = trust(url, settings.tls_ca, target.run_file)
    endpoint = Endpoint.of(url, settings.api_key.get_secret_value(), tls)
    try:
        model = settings.served_model_name or known_model or await first_model(endpoint, MODEL_TIMEOUT_S)
    except (ServerError, OSError, TimeoutError, EOFError) as error:
        raise RequestFailed(
            f"--url: {url} lists no model ({str(error) or type(error).__name__}); give --model"
        ) from None
    path = PATHS[settings.endpoint]
    click.echo(f"{len(planned):,} requests to {model} on {url}", err=True)

    def make_body(request: Planned, number: int) -> dict[str, Any]:
        return body_of(settings, model, request, number)

    if settings.concurrency:
        outcomes = await closed_loop(endpoint, path, planned, make_body, settings.timeout, settings.concurrency)
    else:
        outcomes = await open_loop(endpoint, path, planned, make_body, settings.timeout)
    summary = Summary.of(outcomes, settings.ttft_target, settings.tpot_target)
    click.echo(text(summary))
    if detail := next((outcome.detail for outcome in outcomes if outcome.error and outcome.detail), ""):
        click.echo(f"first error: {detail}", err=True)
    _write(settings, model, url, summary, outcomes)
    return summary.num_whole > 0


def _write(settings: BenchSettings, model: str, url: str, summary: Summary, outcomes: Sequence[Outcome]) -> None:
    try:
        if settings.json_file is not None:
            document = {
                "url": url,
                "model": model,
                "settings": settings.model_dump(mode="json", exclude=NOT_WRITTEN),
                "summary": summary.as_json(),
                "requests": [asdict(outcome) for outcome in outcomes],
            }
            settings.json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if settings.svg is not None:
            settings.svg.write_text(picture(f"{model} on {url}", summary, outcomes), encoding="utf-8")
    except OSError as error:
        raise KvferryError(f"{error.filename}: {error.strerror}") from None
