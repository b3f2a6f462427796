"""What is behind every route that generates: one request from its body to its last byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry.wire.fields import pack_tokens
from kvferry_gateway.admission import Admission
from kvferry_gateway.answers.answer import Answer, Details, Usage
from kvferry_gateway.answers.prompt_logprobs import NOTHING_TOLD, check_size
from kvferry_gateway.answers.prompt_scores import PromptScores
from kvferry_gateway.errors import (
    ApiError,
    ClientGone,
    internal_error,
)
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.flights.choices import Choice, best, make_stream, together, usage_of
from kvferry_gateway.flights.flight import Flight
from kvferry_gateway.flights.offer import Unit
from kvferry_gateway.http.asgi import EVENT_STREAM, Caller, Exchange, connection_of, respond
from kvferry_gateway.http.connection import ClientConnection, Send
from kvferry_gateway.http.rate_limit import Charge
from kvferry_gateway.metrics import Route
from kvferry_gateway.models import Models, ServedModel
from kvferry_gateway.parsing.forms import PLAIN_TEXT
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest
from kvferry_gateway.requests.prompt import Prompt, most_tokens, within
from kvferry_gateway.spans import note_answer, note_request
from kvferry_gateway.streams.stream import TextRules
from kvferry_gateway.streams.told import ToldStream

# How long a client may take to read the end of an answer that is complete; the second one while shutting down.
LINGER_S: Final = 30.0
SHUTDOWN_LINGER_S: Final = 1.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was understood, and what makes its answer, from an id, a model's name and so on (`Answer`)."""

    request: ChatRequest | CompletionRequest
    form: Callable[..., Answer]


class Completions:
    """One gateway's requests under way."""

    def __init__(self, fleet: Fleet, models: Models) -> None:
        self._fleet = fleet
        self._models = models
        self._metrics = fleet.metrics
        self._admission = Admission(fleet.metrics, fleet.settings.max_requests, models.names)
        self._num_admitted = 0
        self._flights: dict[Flight, ClientConnection] = {}

    @property
    def draining(self) -> bool:
        return self._admission.draining

    def max_model_len(self, model: ServedModel) -> int:
        """Longest prompt + output that can be served now."""
        told = self._fleet.registry.max_model_len(model.name)
        return min(told or model.max_context, model.max_context)

    @property
    def num_live(self) -> int:
        """Choices under way."""
        return self._admission.num_live

    async def drain(self, grace: float) -> None:
        """Take no more; give what is under way `grace` seconds, then end it with an error."""
        self._admission.draining = True
        idle = asyncio.ensure_future(self._admission.idle())
        await asyncio.wait((idle,), timeout=grace)
        if not idle.done():
            log.warning("requests cut off", num_requests=self.num_live)
            for flight in list(self._flights):
                flight.shut_down()
            await asyncio.wait((idle,), timeout=SHUTDOWN_LINGER_S)
            for connection in list(self._flights.values()):
                connection.abort()
            await idle

    # -- one request -----------------------------------------------------------------------------------------

    async def serve(self, route: Route, read: Callable[[], Asked], exchange: Exchange) -> None:
        """`read` makes sense of the body. Raises `ApiError` for whatever ends the request before its answer begins."""
        caller, send = exchange.caller, exchange.send
        outcome = "error"
        began = now()
        model_name, num_choices = "", 0
        charge: Charge | None = None
        usage: Usage | None = None
        try:
            self._admission.check()
            caller.allowance.take_request(began)
            asked = read()
            request = asked.request
            model = self._models.asked_for(request.model)
            model_name = model.name
            self._admission.admit(model_name, 1)
            num_choices = 1
            prompts = await model.prompter.prepare(request, self.max_model_len(model))
            if (num_top := request.num_scored) is not None:
                field = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
                check_size(sum(len(prompt.tokens) for prompt in prompts), request.n, num_top, field)
            self._admission.admit(model_name, len(prompts) * request.num_drawn - num_choices)
            num_choices = len(prompts) * request.num_drawn
            if caller.span is not None:
                note_request(caller.span, request, model_name, num_choices, began, now())
            if request.token_limit is None and (most := caller.allowance.limits.tokens) is not None:
                prompts = within(prompts, request.num_drawn, most)
            charge = caller.allowance.charge_tokens(most_tokens(prompts, request.num_drawn), now())
            answer = asked.form(
                self._fleet.runtime.random_bytes(16).hex(),
                model_name,
                int(self._fleet.runtime.wall_clock()),
                model.prompter.texts,
                include_usage=request.include_usage,
                details=Details(
                    request.num_logprobs is not None,
                    request.return_token_ids,
                    request.prompt_logprobs,
                    request.num_echoed_logprobs,
                    request.counts_on,
                ),
            )
            connection = connection_of(exchange.scope, exchange.receive, send)
            choices = self._choices(model, request, prompts, answer, caller)
            self._flights |= {choice.flight: connection for choice in choices}
            try:
                connection.watch(lambda: _abandon(choices), lambda: _resume(choices))
                if connection.lost:
                    raise ClientGone("the client closed its connection")
                self._metrics.prompt_tokens.labels(model_name).inc(sum(len(prompt.tokens) for prompt in prompts))
                if request.stream:
                    outcome = await self._stream(choices, answer, request.include_usage, caller, connection, send)
                else:
                    outcome = await self._whole(choices, request.n, answer, caller, connection, send)
            finally:
                for choice in choices:
                    del self._flights[choice.flight]
                    self._fleet.attached.pop(choice.stream, None)
                    choice.stream.detach()
                    choice.flight.close()
                await connection.close()
                usage = usage_of(choices)
                self._measure(model_name, choices, began)
        except ClientGone:
            outcome = "client_gone"
        except ApiError as error:
            outcome = error.code or str(error.status)
            if usage is not None and usage.completion_tokens == 0:
                usage = None  # what we failed at is not on the client's account
            raise
        finally:
            if charge is not None:
                caller.allowance.settle_tokens(charge, 0 if usage is None else usage.total_tokens, now())
            self._metrics.requests.labels(model_name, route, outcome).inc()
            if caller.span is not None:
                note_answer(caller.span, outcome, usage)
            if num_choices:
                self._admission.release(model_name, num_choices)

    def _choices(
        self,
        model: ServedModel,
        request: ChatRequest | CompletionRequest,
        prompts: list[Prompt],
        answer: Answer,
        caller: Caller,
    ) -> list[Choice]:
        """`num_drawn` choices of each prompt, in the answer's order."""
        prompter = model.prompter
        eos_ends = prompts[0].sampling.ends_at_eos
        silent = set(request.stop_token_ids) | (prompter.eos_token_ids if eos_ends else set())
        ends_hidden = not request.include_stop_str_in_output
        # A special token has no text anyhow; only where it would have some need the ends be looked for.
        shown = frozenset() if prompts[0].reading is PLAIN_TEXT else prompter.readings.shown
        needs_look = request.stop_token_ids or not request.skip_special_tokens
        rules = TextRules(
            request.min_tokens,
            frozenset(silent) if ends_hidden and needs_look else frozenset(),
            request.include_stop_str_in_output,
            request.skip_special_tokens,
            shown,
        )
        arrival = self._fleet.runtime.wall_clock()
        choices: list[Choice] = []
        for index in range(len(prompts) * request.num_drawn):
            prompt, number = prompts[index // request.num_drawn], index % request.num_drawn
            self._num_admitted += 1
            unit = Unit(
                number=self._num_admitted,
                request_id=caller.request_id,
                model=model.name,
                prompt=pack_tokens(prompt.tokens),
                sampling=prompt.sampling,
                salt=caller.salt,
                arrival=arrival,
                prompt_field=request.prompt_field,
                priority=request.priority,
                choice=number,
                span=caller.span,
            )
            stream = make_stream(answer, index, prompt, request.stops, rules, streamed=request.stream)
            flight = Flight(self._fleet, unit, stream, prompter.eos_token_ids)
            choice = Choice(index, prompt, stream, flight, choices[index - number] if number else None)
            stream.on_first_token = choice.begun.set if request.num_drawn > 1 else None
            if (num_top := request.num_scored) is not None and choice.leader is None:
                stream.scores = PromptScores(len(prompt.tokens), num_top)
            choices.append(choice)
        return choices

    async def _stream(
        self,
        choices: list[Choice],
        answer: Answer,
        include_usage: bool,
        caller: Caller,
        connection: ClientConnection,
        send: Send,
    ) -> str:
        await together(_leaders(choices), lambda choice: choice.flight.take_off())
        await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM, *caller.headers]})
        max_backlog = self._fleet.settings.max_backlog_bytes
        for choice in choices:
            prompt, stream = choice.prompt, choice.stream
            if isinstance(stream, ToldStream) and choice.scores is not None:
                stream.hold_back()  # until its prompt is scored
            else:
                first = answer.first_event(choice.index, prompt.echo, prompt.tokens.tolist())
                if answer.opens_at_once:
                    stream.pieces.insert(0, first)
                else:
                    stream.lead = first
            stream.attach(connection, now(), max_backlog, lambda: self._too_slow(connection))
            self._fleet.attached[stream] = None
        outcome = "ok"

        async def land(choice: Choice) -> None:
            await (choice.land() if choice.scores is None else _land_echoed(choice, answer))
            choice.stream.put(answer.last_event(choice.index, choice.reason))
            if len(choices) > 1:
                choice.stream.flush(now())

        try:
            await together(choices, land)
            last = answer.end(usage_of(choices) if include_usage else None)
        except ApiError as error:
            outcome, last = error.code or str(error.status), answer.failed(error)
        except ClientGone:
            raise
        except Exception:
            # The answer has begun as a 200: only an event can still tell the client.
            log.exception("stream failed", request_id=caller.request_id)
            outcome, last = "internal_error", answer.failed(internal_error())
        for choice in choices[:-1]:
            choice.stream.close(b"", now())
        choices[-1].stream.close(last, now())
        try:
            async with asyncio.timeout(LINGER_S):
                await connection.close()
                if not connection.lost:  # what was aborted must not look whole
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            self._too_slow(connection)
            return "slow_client"
        return "client_gone" if connection.lost else outcome

    async def _whole(
        self, choices: list[Choice], n: int, answer: Answer, caller: Caller, connection: ClientConnection, send: Send
    ) -> str:
        await together(_leaders(choices), lambda choice: choice.flight.take_off())
        await together(choices, Choice.land)
        told = {choice: await choice.tell_prompt(answer) for choice in _leaders(choices) if choice.scores is not None}
        wholes = [choice.whole(told.get(choice.leader or choice, NOTHING_TOLD)) for choice in best(choices, n)]
        body = answer.whole(wholes, usage_of(choices))
        await connection.close()
        await respond(send, 200, body, caller.headers)
        return "ok"

    def _measure(self, model: str, choices: list[Choice], began: float) -> None:
        first = [choice.stream.first_token_at for choice in choices if choice.stream.first_token_at is not None]
        if first:
            self._metrics.ttft.labels(model).observe(min(first) - began)
        self._metrics.e2e.labels(model).observe(now() - began)
        self._metrics.generated_tokens.labels(model).inc(sum(len(choice.stream.tokens) for choice in choices))
        self._metrics.cached_tokens.labels(model).inc(sum(choice.stream.cached_tokens for choice in choices))

    def _too_slow(self, connection: ClientConnection) -> None:
        self._metrics.slow_clients.inc()
        connection.abort()


def _leaders(choices: list[Choice]) -> list[Choice]:
    return [choice for choice in choices if choice.leader is None]


async def _land_echoed(choice: Choice, answer: Answer) -> None:
    """Land a choice whose stream begins with its prompt and how likely that is."""

    async def begin() -> None:
        told, prompt, stream = await choice.tell_prompt(answer), choice.prompt, choice.stream
        assert isinstance(stream, ToldStream), "it tells log-probabilities"
        stream.begin(answer.first_event(choice.index, prompt.echo, prompt.tokens.tolist(), told), now())

    beginning = asyncio.ensure_future(begin())
    try:
        await choice.land()
        await beginning
    finally:
        beginning.cancel()
        await asyncio.gather(beginning, return_exceptions=True)


def _abandon(choices: list[Choice]) -> None:
    for choice in choices:
        choice.flight.abandon()


def _resume(choices: list[Choice]) -> None:
    for choice in choices:
        choice.stream.resume(now())
