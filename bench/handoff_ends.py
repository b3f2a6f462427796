"""The two ends of a hand-off without an engine: real workers, real data plane, real KV pools, no computing.

python -m bench.handoff_ends MODEL_DIR TRANSPORT NUM_TOKENS ROUNDS     the prefill process; prints its address

P holds one prompt's KV after the other; D opens, fetches, checks, scatters. What is timed is D's whole hand-off,
from the accepted request to the runnable sequence, as gather, checksum, transfer, check and scatter make it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import MemoryBroker, MemoryBus
from kvferry.engine.native.library import LibraryUnavailable
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.runtime import SystemRuntime, now
from kvferry.schedule.sequence import Emission, Sequence
from kvferry.schedule.step import ModelRunner, StepPlan, StepResult
from kvferry.transport.base import TransportSettings
from kvferry.transport.factory import open_transport
from kvferry.transport.slots import SlotPool
from kvferry.wire.fields import pack_tokens
from kvferry.wire.record import WorkerAddress
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import DecodeRequest, PrefillRequest, Work
from kvferry.worker.parts import Parts
from kvferry_decode.settings import DecodeSettings
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.settings import PrefillSettings
from kvferry_prefill.worker import PrefillWorker

_KEY: Final = b"key of the hand-off benchmark..."
_INCARNATIONS: Final = {"prefill": 1, "decode": 2}


class Idle:
    """Steps of a runner that computes nothing: they draw token 1. Its pool and its copies are real."""

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(tuple(None if step.draw is None else 1 for step in plan.steps), 0.0)


class IdleNativeRunner(Idle, NativeRunner):
    """The native engine's."""


class IdleTorchRunner(Idle, TorchRunner):
    """The torch engine's."""


def num_blocks(num_tokens: int) -> int:
    """Of a pool for prompts of so many tokens."""
    return 3 * (num_tokens // 16 + 2)


def idle_runner(model_dir: Path, num_tokens: int) -> ModelRunner:
    """Of the engine that a worker has here."""
    settings = EngineSettings(model_dir, num_blocks=num_blocks(num_tokens), threads=1)
    try:
        return IdleNativeRunner(settings)
    except LibraryUnavailable:
        return IdleTorchRunner(settings)


class CountedPrefillWorker(PrefillWorker):
    """Tells when D has acknowledged a sequence."""

    gone: asyncio.Event

    def forget(self, sequence: Sequence, outcome: str) -> None:
        super().forget(sequence, outcome)
        self.gone.set()


class TimedDecodeWorker(DecodeWorker):
    """Tells when a fetched sequence may run."""

    runnable: asyncio.Event

    def emit(self, emission: Emission) -> None:
        if emission.first:
            self.runnable.set()
        super().emit(emission)


async def parts(role: str, runner: ModelRunner, transport: str) -> Parts:
    runtime = SystemRuntime()
    bus = MemoryBus(MemoryBroker(runtime), BusSettings("memory://", role, role), runtime)
    await bus.start()
    return Parts(
        runtime=runtime,
        bus=bus,
        transport=open_transport(transport, TransportSettings(_INCARNATIONS[role], _KEY), runtime),
        slots=SlotPool(16),
        runner=runner,
        incarnation=_INCARNATIONS[role],
        model_name="bench",
        pid=0,
    )


def sequence(worker: Any, number: int, num_tokens: int) -> Sequence:
    """The same prompt on both sides, another one each time: no cache may help."""
    prompt = np.random.default_rng(number).integers(0, worker.runner.vocab_size, num_tokens)
    work = Work(
        gateway="bench", gateway_incarnation=3, ticket=number.to_bytes(16, "little"), attempt=number, stream_id=number,
        choice=0, request_id="", model="bench", prompt=pack_tokens(prompt.tolist()), generated=b"",
        sampling=Sampling(max_tokens=2, ignore_eos=True), priority=0, arrival=0.0, salt=b"", unit=number,
    )  # fmt: skip
    kv = worker.runner.kv_format
    return Sequence(number, work, kv.format_id, kv.block_size, worker.runner.max_model_len, now())


async def serve_prefill(runner: ModelRunner, transport: str, num_tokens: int, rounds: int) -> None:
    settings = PrefillSettings.model_validate({})
    worker = CountedPrefillWorker(settings, await parts("prefill", runner, transport))
    worker.gone = asyncio.Event()
    await worker.transport.start(worker.attach)
    await worker.start()
    print(worker.transport.address, flush=True)
    for number in range(1, rounds + 1):
        item = sequence(worker, number, num_tokens)
        assert worker.accept(PrefillRequest(item.work), item) is None
        worker.wake()
        await worker.gone.wait()
        worker.gone.clear()
    await worker.stop()


async def pull(runner: ModelRunner, transport: str, num_tokens: int, rounds: int, address: str) -> list[float]:
    """Seconds of each hand-off."""
    worker = TimedDecodeWorker(DecodeSettings.model_validate({}), await parts("decode", runner, transport))
    worker.runnable = asyncio.Event()
    await worker.transport.start(worker.attach)
    await worker.start()
    seconds = []
    for number in range(1, rounds + 1):
        item = sequence(worker, number, num_tokens)
        await asyncio.sleep(0.05)  # P holds the next prompt's KV by now
        worker.runnable.clear()
        began = time.perf_counter()
        request = DecodeRequest(item.work, WorkerAddress(_INCARNATIONS["prefill"], (address,)))
        assert worker.accept(request, item) is None
        await asyncio.wait_for(worker.runnable.wait(), 30)
        seconds.append(time.perf_counter() - began)
    await worker.stop()
    return seconds


if __name__ == "__main__":
    model, backend, length, count = sys.argv[1:]
    uvloop.run(serve_prefill(idle_runner(Path(model), int(length)), backend, int(length), int(count)))
