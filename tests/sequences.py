"""Works and sequences for tests of the schedulers and of what stands around them, without a cluster."""

from __future__ import annotations

from collections.abc import Sequence as Numbers
from itertools import count
from typing import Any

from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Sequence
from kvferry.schedule.step import KVFormat, StepPlan, StepResult
from kvferry.wire.fields import pack_tokens
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import Work

BLOCK = 4
KV = KVFormat(num_layers=3, num_kv_heads=2, head_dim=4, dtype="bfloat16", block_size=BLOCK, format_id="f")
GATEWAY = 77

_numbers = count(1)  # ids need only differ


def work_of(prompt: Numbers[int] | int, **fields: Any) -> Work:
    """A work with a prompt of these tokens, or of that many tokens which no other work shares."""
    number = next(_numbers)
    tokens = [number * 1000 + place for place in range(prompt)] if isinstance(prompt, int) else list(prompt)
    max_tokens = fields.pop("max_tokens", 8)
    made: dict[str, Any] = {
        "gateway": f"gateway-{GATEWAY}",
        "gateway_incarnation": GATEWAY,
        "ticket": number.to_bytes(16, "big"),
        "attempt": number,
        "stream_id": number,
        "choice": 0,
        "request_id": f"r{number}",
        "model": "m",
        "prompt": pack_tokens(tokens),
        "generated": pack_tokens(fields.pop("generated", [])),
        "sampling": Sampling(temperature=0.0, max_tokens=max_tokens),
        "priority": 0,
        "arrival": float(number),
        "salt": b"",
        "unit": number,
        **fields,
    }
    return Work(**made)


def sequence_of(prompt: Numbers[int] | int, *, now: float = 0.0, max_model_len: int = 1000, **fields: Any) -> Sequence:
    return Sequence(next(_numbers), work_of(prompt, **fields), KV.format_id, BLOCK, max_model_len, now)


def result_of(plan: StepPlan, token: int = 5, seconds: float = 0.01) -> StepResult:
    """What a runner would answer that always draws the same token."""
    return StepResult(tuple(None if step.draw is None else token for step in plan.steps), seconds)


def assert_all_free(memory: KVMemory) -> None:
    memory.check_integrity()
    assert memory.pool.num_free == memory.pool.num_blocks, memory.ledger.rows(0.0)
    assert len(memory.ledger) == 0
    assert memory.num_doomed == 0
