"""The columns of the parity matrix: ways through a cluster, and what each answers to a row."""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Literal, get_args

from api_cluster import ApiCluster, api, joined, timeless
from cluster import settled
from parity_rows import CELLS, body_of

from kvferry_decode.worker import DecodeWorker

Way = Literal["single worker", "pair", "pair with a prefix hit", "local prefill"]
WAYS: tuple[Way, ...] = get_args(Way)
FAILOVER_AT = 4  # tokens that a choice has when its decode worker is killed, or half of what it will have


async def run(cluster: ApiCluster, name: str, *, stream: bool) -> Any:
    path, body = body_of(name, stream=stream)
    return await cluster.ask(path, body)


@functools.cache
def answers(way: Way) -> dict[tuple[str, bool], Any]:
    """Every row, streamed and not, from one cluster."""
    found: dict[tuple[str, bool], Any] = {}
    disaggregated = way in ("pair", "pair with a prefix hit")

    async def scenario(cluster: ApiCluster) -> None:
        for name, stream in CELLS:
            if way == "pair with a prefix hit":
                await run(cluster, name, stream=stream)  # leaves its prompt in both workers' caches
            else:
                for worker in cluster.workers:
                    worker.scheduler.memory.pool.drop_cache()
            found[name, stream] = await run(cluster, name, stream=stream)
        kinds = {
            kind: cluster.api.fleet.metrics.value("kvferry_placement_total", kind=kind) for kind in ("pair", "local")
        }
        assert kinds["local" if disaggregated else "pair"] == 0, kinds
        assert kinds["pair" if disaggregated else "local"] >= len(CELLS), kinds

    threshold = 100_000 if way == "local prefill" else 0
    api(scenario, disaggregated=way != "single worker", local_prefill_threshold=threshold)
    return found


def after_a_kill(name: str, *, stream: bool) -> Any:
    """The answer of a pair whose decode worker is killed in the middle, with a spare that is warm. None: it has no
    middle."""
    answered: list[Any] = []

    async def scenario(cluster: ApiCluster) -> None:
        at = _tokens_at_the_kill(name)
        asking = asyncio.ensure_future(run(cluster, name, stream=stream))
        await settled(lambda: asking.done() or any(len(each.tokens) >= at for each in cluster.streams), 10.0)
        if asking.done():
            return
        begun = next(each for each in cluster.streams if len(each.tokens) >= at)
        assert begun.attempt is not None
        victim = next(w for w in cluster.workers if w.incarnation == begun.attempt.decode.incarnation)
        assert isinstance(victim, DecodeWorker)
        await cluster.kill(victim)
        answered.append(await asking)
        lost = cluster.api.fleet.metrics.value("kvferry_replacement_total", reason="decode_gone")
        assert lost >= 1, "the kill cost nobody anything"

    if _tokens_at_the_kill(name):
        api(scenario, spares=1)
    return answered[0] if answered else None


def _tokens_at_the_kill(name: str) -> int:
    """0: its choices are too short to have a middle."""
    answer = answers("single worker")[name, False]
    usage = answer["usage"]
    generated = usage["output_tokens" if "output_tokens" in usage else "completion_tokens"]
    return int(min(FAILOVER_AT, generated // len(answer.get("choices", (0,))) // 2))


def told(answer: Any) -> Any:
    """All that an answer tells, without what differs from request to request; of a stream what it adds up to."""
    if not isinstance(answer, list):
        return timeless(answer)
    last = timeless(answer[-1])
    return last["response"] if "response" in last else (joined(answer), last["usage"])


def equal(name: str, stream: bool, one: Any, other: Any) -> bool:
    """Streams of one choice event by event, those of several by what they add up to: choices take turns."""
    if stream and len(texts(one)) == 1:
        return bool(timeless(one) == timeless(other))
    return bool(told(one) == told(other))


def texts(answer: Any) -> dict[int, str]:
    if isinstance(answer, list):
        if "response" in answer[-1]:
            return texts(answer[-1]["response"])
        return {index: choice["text"] for index, choice in joined(answer).items()}
    if "output" in answer:
        parts = [part for item in answer["output"] for part in item.get("content", ())]
        return {0: "".join(part["text"] for part in parts)}
    return {c["index"]: (c["message"]["content"] or "") if "message" in c else c["text"] for c in answer["choices"]}
