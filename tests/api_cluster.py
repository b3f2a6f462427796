"""The whole API in one process: a real gateway's ASGI application over real workers, on a virtual clock."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from cluster import MODEL, Cluster, check_clean, settled
from scripted_worker import EOS, VOCAB_SIZE, write_model
from virtual_loop import VirtualLoop

from kvferry.engine.memory.runner import MemorySettings
from kvferry.trace.span import MemoryExporter
from kvferry_gateway.service import Gateway
from kvferry_gateway.settings import GatewaySettings
from kvferry_gateway.streams.stream import TokenStream

BYTES = MemorySettings(
    num_blocks=MODEL.num_blocks,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({EOS}),
    seconds_per_step=MODEL.seconds_per_step,
    seconds_per_token=MODEL.seconds_per_token,
)


class ApiCluster(Cluster):
    """`disaggregated`: one prefill and one decode worker, nothing prefilled locally; else one decode worker alone."""

    async def open(self, folder: Path, *, disaggregated: bool, spares: int = 0, **settings: Any) -> None:
        made = {"name": "gateway-0", "local_prefill_threshold": 0, **settings}
        self.bus_of_gateway = self.bus("gateway-0", "gateway")
        await self.bus_of_gateway.start()
        model = write_model(folder / "memory", max_context=1024)
        self.tokenizer_path = model.tokenizer_path
        self.api = await Gateway.start(
            GatewaySettings(**made), self.runtime, self.bus_of_gateway, {"memory": model}, pid=7, created=1,
            spans=self.spans,
        )  # fmt: skip
        if disaggregated:
            await self.prefill(model=BYTES)
        for number in range(1 + spares):
            await self.decode(f"decode-{number}", model=BYTES)
        await settled(lambda: len(self.api.fleet.registry) == len(self.workers), 5.0)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.api.app), base_url="http://api")

    async def stop(self) -> None:
        await self.http.aclose()
        await settled(lambda: not any(len(worker.outbox) for worker in self.workers), 5.0)
        assert len(self.api.fleet.table) == 0
        assert not self.api.fleet.attached
        assert self.api.completions.num_live == 0
        await self.api.stop()
        await self.bus_of_gateway.close()
        await super().stop()

    @property
    def streams(self) -> list[TokenStream]:
        """Of the choices that run now."""
        table = self.api.fleet.table
        return list({a.stream_id: a.stream for w in self.workers for a in table.of_worker(w.incarnation)}.values())

    async def ask(self, path: str, body: dict[str, Any]) -> Any:
        """The answer's JSON, or the events of its stream."""
        response = await self.http.post(path, json=body, timeout=None)
        assert response.status_code == 200, response.text
        if not body.get("stream"):
            return response.json()
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        if path == "/v1/responses":
            return [json.loads(line) for line in lines]
        assert lines[-1] == "[DONE]", response.text[-500:]
        return [json.loads(line) for line in lines[:-1]]

    async def leave(self, path: str, body: dict[str, Any], when: Callable[[], bool]) -> None:
        """Ask, and hang up as soon as `when`: what a server tells the application, without one."""
        left = asyncio.Event()
        waiting = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "headers": []}
        serving = asyncio.ensure_future(self.api.app(scope, receive, send))
        await settled(when, 5.0)
        left.set()
        await serving

    async def error(self, path: str, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
        response = await self.http.post(path, json=body, timeout=None)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        return error


def api(
    scenario: Callable[[ApiCluster], Awaitable[None]],
    *,
    disaggregated: bool = True,
    spares: int = 0,
    spans: MemoryExporter | None = None,
    **settings: Any,
) -> None:
    """Run a scenario; afterwards nothing is left on any worker, in any table, or as a task."""

    async def body() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cluster = ApiCluster(spans=spans)
            await cluster.open(Path(folder), disaggregated=disaggregated, spares=spares, **settings)
            await scenario(cluster)
            await cluster.stop()
        for worker in cluster.workers:
            check_clean(worker)
        left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks left: {left}"

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(300.0)) as runner:
        runner.run(body())


def scenario(test: Callable[[ApiCluster], Awaitable[None]]) -> Callable[[], None]:
    """A test on a fresh cluster of one pair."""

    def run() -> None:
        api(test)

    run.__name__ = test.__name__
    return run


# What differs from request to request, and what a cache did for it.
OF_ITS_TIME = frozenset(
    {"id", "created", "prompt_tokens_details", "item_id", "call_id", "created_at", "input_tokens_details"}
)


def timeless(answer: Any) -> Any:
    """An answer without what differs from request to request, and without what a cache did for it."""
    if isinstance(answer, list):
        return [timeless(item) for item in answer]
    if isinstance(answer, dict):
        return {key: timeless(value) for key, value in answer.items() if key not in OF_ITS_TIME}
    return answer


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the events of a stream add up to, choice by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            choice = choices.setdefault(
                part["index"],
                {"text": "", "reasoning": "", "calls": [], "logprobs": {}, "token_ids": [], "reason": None},
            )
            choice["text"] += part["delta"].get("content", "") if "delta" in part else part["text"]
            choice["reasoning"] += part.get("delta", {}).get("reasoning_content", "")
            for call in part.get("delta", {}).get("tool_calls", ()):
                if "id" in call:
                    choice["calls"].append(dict(call["function"]))
                else:
                    choice["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            choice["token_ids"] += part.get("token_ids") or []
            choice["reason"] = part["finish_reason"] or choice["reason"]
            for key, column in (part["logprobs"] or {}).items():
                choice["logprobs"].setdefault(key, []).extend(column or [])
    return choices
