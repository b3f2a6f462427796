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
from kvferry.engine.torch_runner import TorchRunner
from kvferry.runtime import SystemRuntime, now
from kvferry.schedule.sequence import Emission, Sequence
from kvferry.schedule.step import StepPlan, StepResult
from kvferry.transport.base import TransportSettings
from kvferry.transport.factory import open_transport
from kvferry.transport.slots import SlotPool
from kvferry.wire.messages import DecodeRequest, PrefillRequest, Sampling, Work, WorkerAddress, pack_tokens
from kvferry.worker.worker import Parts
from kvferry_decode.settings import DecodeSettings
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.settings import PrefillSettings
from kvferry_prefill.worker import PrefillWorker

_KEY: Final = b"key of the hand-off benchmark..."
_INCARNATIONS: Final = {"prefill": 1, "decode": 2}


def idle_runner(settings: EngineSettings) -> NativeRunner | TorchRunner:
    """Pool and copies of the engine that a worker has here. Its steps compute nothing: they draw token 1."""
    runner: NativeRunner | TorchRunner
    try:
        runner = NativeRunner(settings)
    except LibraryUnavailable:
        runner = TorchRunner(settings)
    runner.execute = _draw  # type: ignore[method-assign]
    return runner


def _draw(plan: StepPlan) -> StepResult:
    return StepResult(tuple(None if step.draw is None else 1 for step in plan.steps), 0.0)


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


async def parts(role: str, model_dir: Path, transport: str, num_tokens: int) -> Parts:
    runtime = SystemRuntime()
    bus = MemoryBus(MemoryBroker(runtime), BusSettings("memory://", role, role), runtime)
    await bus.start()
    runner = idle_runner(EngineSettings(model_dir, num_blocks=3 * (num_tokens // 16 + 2), threads=1))
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


async def serve_prefill(model_dir: Path, transport: str, num_tokens: int, rounds: int) -> None:
    settings = PrefillSettings.model_validate({})
    worker = CountedPrefillWorker(settings, await parts("prefill", model_dir, transport, num_tokens))
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


async def pull(model_dir: Path, transport: str, num_tokens: int, rounds: int, address: str) -> list[float]:
    """Seconds of each hand-off."""
    worker = TimedDecodeWorker(
        DecodeSettings.model_validate({}), await parts("decode", model_dir, transport, num_tokens)
    )
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
    uvloop.run(serve_prefill(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
