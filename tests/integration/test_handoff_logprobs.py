"""Log-probabilities over the hand-off: of token 0, which P samples and D repeats, and after a re-placement."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cluster import MODEL, Cluster, prompt_of, virtual

from kvferry.engine.memory.runner import scored_continuation
from kvferry.wire.fields import unpack_tokens
from kvferry.wire.flow import Manifest
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import Work
from kvferry_prefill.source import SequenceSource

SCORED = Sampling(temperature=0.0, max_tokens=8, num_logprobs=3)
LIKELY = {True: "pair", False: "alone"}


def told(cluster_gateway: Any, work: Work) -> list[tuple[int, Any]]:
    found = cluster_gateway.logprobs[work.stream_id]
    start = len(work.generated) // 4
    return [(token, found[start + place]) for place, token in enumerate(cluster_gateway.text(work))]


def wanted(prompt: list[int], sampling: Sampling = SCORED) -> list[tuple[int, Any]]:
    rows = scored_continuation(MODEL, prompt, sampling, 0, sampling.max_tokens)
    return [(token, (row.logprob, row.top_tokens, row.top_logprobs)) for token, row in rows if row is not None]


@pytest.mark.parametrize("disaggregated", [True, False], ids=LIKELY.__getitem__)
@pytest.mark.parametrize("length", [1, 16, 75])
def test_every_token_has_those_of_the_reference(disaggregated: bool, length: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode, gateway = await cluster.prefill(), await cluster.decode(), await cluster.gateway()
        work = await gateway.run(prompt_of(length), decode, prefill if disaggregated else None, sampling=SCORED)
        assert told(gateway, work) == wanted(prompt_of(length))

    virtual(scenario)


def test_token_0_has_them_from_d_when_the_batch_of_p_is_lost() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode, gateway = await cluster.prefill(), await cluster.decode(), await cluster.gateway()
        gateway.lose = 1
        work = await gateway.run(prompt_of(40), decode, prefill, sampling=SCORED)
        assert gateway.lose == 0
        assert told(gateway, work) == wanted(prompt_of(40))

    virtual(scenario)


def test_who_wants_none_gets_none_beside_one_who_does() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode, gateway = await cluster.prefill(), await cluster.decode(), await cluster.gateway()
        plain = gateway.work(prompt_of(50, 1))
        scored = gateway.work(prompt_of(60, 2), sampling=SCORED)
        for work in (plain, scored):
            await gateway.accepted(work, decode, prefill)
        for work in (plain, scored):
            await gateway.ended(work)
        assert plain.stream_id not in gateway.logprobs
        assert told(gateway, scored) == wanted(prompt_of(60, 2))

    virtual(scenario)


def test_a_later_attempt_goes_on_with_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode, gateway = await cluster.prefill(), await cluster.decode(), await cluster.gateway()
        first = gateway.work(prompt_of(40), sampling=SCORED)
        await gateway.accepted(first, decode, prefill)
        await gateway.until(lambda: len(gateway.text(first)) >= 3)
        await gateway.cancel(first, decode)
        before = told(gateway, first)
        second = gateway.again(first)
        await gateway.accepted(second, decode, prefill)
        await gateway.ended(second)
        assert len(unpack_tokens(second.generated)) == len(before) >= 3
        assert before + told(gateway, second) == wanted(prompt_of(40))

    virtual(scenario)


def test_a_manifest_that_lacks_them_is_no_good(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest_of = SequenceSource.manifest

    def without(self: SequenceSource, *rest: Any) -> Manifest:
        return msgspec.structs.replace(manifest_of(self, *rest), logprobs=None)

    monkeypatch.setattr(SequenceSource, "manifest", without)

    async def scenario(cluster: Cluster) -> None:
        prefill, decode, gateway = await cluster.prefill(), await cluster.decode(), await cluster.gateway()
        plain = await gateway.run(prompt_of(40, 1), decode, prefill)
        assert gateway.ends[plain.stream_id].reason == "length", "who wants none does not miss them"
        work = await gateway.run(prompt_of(40), decode, prefill, sampling=SCORED)
        assert gateway.ends[work.stream_id].reason == "transfer_failed"
        assert decode.metrics.transfer_failures.labels("first_token")._value.get() >= 1
        await gateway.cancel(work, prefill)

    virtual(scenario)
