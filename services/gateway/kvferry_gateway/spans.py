"""The spans of a request at the gateway.

    POST /v1/…              from the parsed head to the last byte; a child of the client's span, if it told one
      prepare               template, tokens
      attempt …             one placement of one choice, with placement's reason: from the decision until it is over
        prefill, decode     the workers' own, see `kvferry.trace.journal`
      wait for workers …    nobody could take it, or the rest of it

Their names and attributes, and when they count as failed.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Final

from kvferry.trace.open_span import OpenSpan
from kvferry.trace.span import Value
from kvferry.trace.tracer import Tracer
from kvferry_gateway.answers.answer import Usage
from kvferry_gateway.http.asgi import Scope
from kvferry_gateway.placement.decision import Reason
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.streams.attempt import Attempt, Finished, Lost

NOT_OURS: Final = ("ok", "client_gone", "slow_client")  # outcomes of an answer that has begun, and no fault of ours


def begin_request(tracer: Tracer, scope: Scope, request_id: str, moment: float) -> OpenSpan | None:
    """None: nobody records the trace. The path is a route's."""
    span = tracer.begin(f"{scope['method']} {scope['path']}", moment, scope["headers"])
    if span is not None:
        span.set(request_id=request_id)
        span.set_standard({"http.request.method": scope["method"], "http.route": scope["path"]})
    return span


def note_request(
    span: OpenSpan, request: ChatRequest | CompletionRequest, model: str, num_choices: int, began: float, moment: float
) -> None:
    """It was understood and is tokens now: what was asked for, in numbers."""
    operation = "chat" if isinstance(request, ChatRequest) else "text_completion"
    span.set_standard({"gen_ai.operation.name": operation, "gen_ai.request.model": model})
    span.set(stream=request.stream, choices=num_choices)
    span.child("prepare", began).end(moment)


def note_answer(span: OpenSpan, outcome: str, usage: Usage | None) -> None:
    """What came of it."""
    span.set(outcome=outcome)
    if usage is not None:
        span.set(cached_tokens=usage.cached_tokens)
        span.set_standard(
            {"gen_ai.usage.input_tokens": usage.prompt_tokens, "gen_ai.usage.output_tokens": usage.completion_tokens}
        )


def end_request(span: OpenSpan, status: int | None, moment: float) -> None:
    """`status` None: the client was gone before there was any. A client's own mistake is no error of the server's."""
    outcome = span.attributes.get("kvferry.outcome")
    failed = status is not None and (status >= 500 or (status < 400 and outcome not in (None, *NOT_OURS)))
    error = str(outcome or status) if failed else None
    span.set_standard({"http.response.status_code": status, "error.type": error})
    span.end(moment, error)


def begin_attempt(request: OpenSpan, attempt: Attempt, choice: int) -> OpenSpan:
    """Workers were chosen and are asked now."""
    span = request.child("attempt", attempt.forecast.placed_at, "client")
    span.set(
        attempt=attempt.number, choice=choice, first_index=attempt.first_index, decode=attempt.decode.name,
        prefill=None if attempt.prefill is None else attempt.prefill.name, **_reason(attempt.forecast.reason),
    )  # fmt: skip
    return span


def end_attempt(span: OpenSpan, attempt: Attempt, moment: float) -> None:
    """Its tokens are taken no more."""
    if (first := attempt.forecast.first_token_at) is not None:
        span.event("first token", first)
    verdict = attempt.over.result() if attempt.over.done() else None
    error = None
    match verdict:
        case Finished(reason):
            outcome: str = reason
        case Lost(reason):
            outcome = reason
            error = reason if verdict.is_failure else None
        case None:
            outcome = "cancelled" if attempt.accepted or attempt.refusal is None else f"refused: {attempt.refusal}"
    span.set(outcome=outcome, tokens=len(attempt.stream.tokens) - attempt.first_index)
    span.end(moment, error)


def _reason(reason: Reason) -> dict[str, Value]:
    """Why it was placed there; what placement does not know is left out."""
    told = {f"placement.{name}": value for name, value in asdict(reason).items()}
    return {name: value for name, value in told.items() if not isinstance(value, float) or math.isfinite(value)}
