"""Streams that decode are not stalled by the KV of a prompt that arrives beside them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from cluster import MODEL, Cluster, prompt_of, settled, virtual

from kvferry.schedule.step import StepPlan, StepResult
from kvferry.wire.sampling import Sampling
from kvferry.worker.report import load

WIDE = replace(MODEL, num_kv_heads=8, head_dim=128)  # 8 KiB of KV a token: eight tokens fill a slot
NUM_TOKENS = 400
MAX_PACED_FRAMES = 2  # one that was under way as the step began, and the one of this step


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_kv_that_waits_at_p_comes_a_few_frames_at_a_time_while_a_stream_decodes(share: float) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(model=WIDE)
        decode = await cluster.decode(model=WIDE, reserve_lead=0.0, pull_share=share)
        gateway = await cluster.gateway()
        stream = gateway.work(prompt_of(16), sampling=Sampling(temperature=0.0, max_tokens=400))
        await gateway.accepted(stream, decode, prefill)
        await settled(lambda: load(decode).num_running == 1, within=1.0)
        received = [decode.metrics.value("kvferry_kv_bytes_total", direction="received")]
        execute = decode.runner.execute

        def counting(plan: StepPlan) -> StepResult:
            received.append(decode.metrics.value("kvferry_kv_bytes_total", direction="received"))
            return execute(plan)

        decode.runner.execute = counting  # type: ignore[method-assign]
        work = gateway.work(prompt_of(NUM_TOKENS, seed=1))
        await gateway.accepted(work, decode, prefill)
        assert (await gateway.ended(work)).reason == "length"
        assert (await gateway.ended(stream)).reason == "length"
        most = max(later - earlier for earlier, later in itertools.pairwise(received))
        frames = most / decode.slots.slot_bytes
        if share < 1:
            assert 0 < frames <= MAX_PACED_FRAMES
        else:
            assert frames > MAX_PACED_FRAMES, "without the pace nothing would need one"

    virtual(scenario)
