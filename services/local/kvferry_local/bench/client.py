"""One request of a load, and what came of it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from kvferry_local.bench.endpoint import MAX_DETAIL_CHARS, Endpoint, ServerError
from kvferry_local.bench.stream import Stream, stream


@dataclass(slots=True)
class Outcome:
    """Times are seconds of one clock."""

    due: float  # when it should have been sent
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of events with text
    ended: float = 0.0
    prompt_tokens: int = 0  # as the server counted them
    output_tokens: int = 0
    error: str = ""  # empty: a whole answer
    detail: str = ""

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        """Mean time of an output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.output_tokens - 1)


async def ask(endpoint: Endpoint, path: str, body: dict[str, Any], due: float, timeout: float) -> Outcome:
    """POST a streaming request and read it to its end. Never raises but for being cancelled."""
    answer, outcome = Stream(), Outcome(due)
    try:
        async with asyncio.timeout(timeout):
            await stream(endpoint, path, body, into=answer)
        outcome.prompt_tokens, outcome.output_tokens = _counted(answer)
    except ServerError as error:
        outcome.error, outcome.detail = error.kind, error.detail
    except TimeoutError:
        outcome.error = "timeout"
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        outcome.error, outcome.detail = "connection", str(error) or type(error).__name__
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        outcome.error, outcome.detail = "malformed", str(error)
    outcome.sent, outcome.arrivals, outcome.ended = answer.sent, answer.arrivals, answer.ended
    if not outcome.error and not outcome.arrivals:
        outcome.error = "empty"
    outcome.detail = outcome.detail[:MAX_DETAIL_CHARS]
    return outcome


def _counted(answer: Stream) -> tuple[int, int]:
    """Prompt and output tokens. Raises KeyError or TypeError for a usage that is none."""
    if answer.usage is None:  # a server without usage in streams
        return 0, len(answer.arrivals)
    return answer.usage["prompt_tokens"], answer.usage["completion_tokens"]


async def first_model(endpoint: Endpoint, timeout: float) -> str:
    """The name of the first model that the server lists. Raises `ServerError`, OSError, TimeoutError, EOFError."""
    answer = await endpoint.get("/models", timeout)
    try:
        return str(json.loads(answer)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ServerError("malformed", answer.decode(errors="replace")) from None
