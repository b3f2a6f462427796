"""Steps that are planned while the one before them runs, on tokens that are not drawn yet."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from cluster import Cluster, all_free, expected, prompt_of, settled, virtual
from scripted_gateway import ScriptedGateway

from kvferry.runtime import now
from kvferry.schedule.step import StepPlan, StepResult
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import Work
from kvferry_decode.worker import DecodeWorker

LONG = Sampling(temperature=0.0, max_tokens=40)


@dataclass(frozen=True)
class Ran:
    began: float
    plan: StepPlan

    @property
    def streams(self) -> set[int]:
        return {step.sequence_id for step in self.plan.steps}


class Watched:
    """The decode worker's steps and decisions."""

    def __init__(self, worker: DecodeWorker) -> None:
        self.steps: list[Ran] = []
        self.num_decisions = 0
        self.fail_at: int | None = None  # the step of this number raises
        execute, decide = worker.runner.execute, worker.decide

        def recording(plan: StepPlan) -> StepResult:
            self.steps.append(Ran(now(), plan))
            if len(self.steps) - 1 == self.fail_at:
                raise RuntimeError("planted")
            return execute(plan)

        def counting(moment: float) -> object:
            self.num_decisions += 1
            return decide(moment)

        worker.runner.execute = recording  # type: ignore[method-assign]
        worker.decide = counting  # type: ignore[method-assign, assignment]


async def streams(
    cluster: Cluster, count: int, sampling: Sampling = LONG
) -> tuple[DecodeWorker, ScriptedGateway, Watched, list[Work]]:
    """A decode worker with streams that run, from prompts that were prefilled elsewhere."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    gateway = await cluster.gateway()
    watched = Watched(decode)
    works = [gateway.work(prompt_of(20, seed=n), sampling=sampling) for n in range(count)]
    for work in works:
        await gateway.accepted(work, decode, prefill)
    await settled(lambda: decode.scheduler.num_running == count, within=0.5)
    return decode, gateway, watched, works


SEEDED = msgspec.structs.replace(LONG, temperature=0.9, seed=3)
PENALTIES = msgspec.structs.replace(SEEDED, frequency_penalty=0.7, repetition_penalty=1.2)


@pytest.mark.parametrize("sampling", [LONG, SEEDED, PENALTIES], ids=["greedy", "seeded", "penalties"])
def test_streams_that_only_decode_go_on_without_a_decision(sampling: Sampling) -> None:
    async def scenario(cluster: Cluster) -> None:
        _, gateway, watched, works = await streams(cluster, 3, sampling)
        before = watched.num_decisions, len(watched.steps)
        for n, work in enumerate(works):
            await gateway.ended(work)
            assert gateway.text(work) == expected(prompt_of(20, seed=n), sampling, 40)
        decisions, steps = watched.num_decisions - before[0], len(watched.steps) - before[1]
        assert steps >= 38
        assert decisions <= 4, "when a stream has ended"

    virtual(scenario)


def test_a_stream_that_is_cancelled_is_in_no_step_that_begins_later() -> None:
    async def scenario(cluster: Cluster) -> None:
        decode, gateway, watched, (leaving, staying) = await streams(cluster, 2)
        await gateway.until(lambda: len(gateway.text(leaving)) >= 10)
        await gateway.cancel(leaving, decode)
        await settled(lambda: leaving.key not in decode.scheduler.sequences, within=0.1)
        cancelled = now()
        await gateway.ended(staying)
        later = [step for step in watched.steps if step.began > cancelled]
        assert len(later) > 10
        [left] = {step.streams.pop() for step in later if len(step.streams) == 1}
        assert all(step.streams == {left} for step in later)
        assert gateway.text(staying) == expected(prompt_of(20, seed=1), LONG, 40)

    virtual(scenario)


def test_a_stream_that_ends_unforeseen_gets_nothing_from_the_step_that_was_planned_on_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        texts = [expected(prompt_of(20, seed=n), LONG, 40) for n in range(2)]
        end = next(token for token in texts[0][10:] if token not in texts[1] and texts[0].index(token) >= 10)
        length = texts[0].index(end) + 1
        sampling = Sampling(temperature=0.0, max_tokens=40, stop_token_ids=(end,))
        decode, gateway, watched, (first, second) = await streams(cluster, 2, sampling)
        assert (await gateway.ended(first)).reason == "stop"
        await gateway.ended(second)
        assert [gateway.text(first), gateway.text(second)] == [texts[0][:length], texts[1]]
        [began_first] = watched.steps[0].streams
        in_steps = sum(began_first in step.streams for step in watched.steps)
        assert in_steps == length, "one draw less, since the first token came with the KV, and one in vain"
        await settled(lambda: all_free(decode), within=0.1)

    virtual(scenario)


@pytest.mark.parametrize("which", [0, 1, 7])
def test_a_step_that_fails_takes_what_was_planned_on_it_along(which: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        decode, gateway, watched, works = await streams(cluster, 2)
        watched.fail_at = len(watched.steps) + which
        for work in works:
            end = await gateway.ended(work, limit=1.0)
            assert (end.reason, end.detail) == ("error", "RuntimeError")
        assert len(watched.steps) == watched.fail_at + 1
        await settled(lambda: all_free(decode), within=0.2)
        good = await gateway.run(prompt_of(60, seed=1), decode, None, sampling=LONG)
        assert gateway.text(good) == expected(prompt_of(60, seed=1), LONG, 40)

    virtual(scenario)


def test_a_new_request_waits_for_no_step_that_was_planned_before_it_came() -> None:
    async def scenario(cluster: Cluster) -> None:
        decode, gateway, watched, (running,) = await streams(cluster, 1)
        await gateway.until(lambda: len(gateway.text(running)) >= 10)
        work = gateway.work(prompt_of(10, seed=5), sampling=LONG)
        await gateway.accepted(work, decode, None)
        accepted = now()
        await gateway.ended(work)
        first = next(step for step in watched.steps if len(step.plan.steps) == 2)
        between = [step for step in watched.steps if accepted < step.began < first.began]
        assert not between

    virtual(scenario)
