"""What a worker is made of; a simulation gives in-memory twins."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.bus.base import Bus
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.runtime import Runtime
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import ModelLimits
from kvferry.schedule.step import ModelRunner
from kvferry.trace.span import SpanExporter
from kvferry.transport.base import Transport
from kvferry.transport.slots import SlotPool
from kvferry.worker.handoff.shards import RemoteShard


@dataclass(frozen=True, slots=True)
class Parts:
    runtime: Runtime
    bus: Bus
    transport: Transport
    slots: SlotPool
    runner: ModelRunner
    incarnation: int
    model_name: str
    pid: int
    engine: str = ""
    engine_reason: str = ""
    grammars: GrammarCompiler | None = None  # None: requests with a grammar end in an error
    spans: SpanExporter | None = None  # None: no traces
    shards: tuple[RemoteShard, ...] = ()  # ranks on other hosts
    vocabulary_id: str = ""  # of the model's tokenizer, where it is known


def model_limits(runner: ModelRunner) -> ModelLimits:
    return ModelLimits(runner.max_model_len, runner.eos_token_ids)


def kv_memory(runner: ModelRunner) -> KVMemory:
    return KVMemory(runner.num_blocks, runner.kv_format.block_size)
