"""The reference pass over finished texts, and the two negative controls of the parity benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from bench.tap import Heard
from kvferry.engine.reference import ReferencePass
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.kv.digest import slot_digests
from kvferry.schedule.step import NO_TOKENS, SequenceStep, StepPlan
from kvferry.wire.frame import Piece

BLOCK_SIZE: Final = 16
THREADS: Final = 2
CONTROL_TOKENS: Final = 64  # more than enough for a control


def largest_gap(model_dir: Path, max_model_len: int, texts: Sequence[Heard]) -> float:
    """Logit. Every text must be accepted for this to be at most ε."""
    runner = _runner(model_dir, max_model_len)
    try:
        reference = ReferencePass(runner, runner.eos_token_ids)
        compiler = GrammarCompiler(model_dir / "tokenizer.json", runner.vocab_size, runner.eos_token_ids)

        def gap(text: Heard) -> float:
            grammar = text.sampling.grammar
            mask = None if grammar is None else compiler.follow(grammar, NO_TOKENS)
            return reference.check(text.prompt, text.generated, text.sampling, text.choice, mask).largest_gap

        return max(gap(text) for text in texts)
    finally:
        runner.close()


def swapped_token_is_refused(model_dir: Path, text: Heard) -> bool:
    """Whether the reference pass refuses a text whose last token was replaced by another one."""
    runner = _runner(model_dir, len(text.prompt) + len(text.generated) + 1)
    try:
        generated = text.generated
        generated[-1] = (generated[-1] + 1) % runner.vocab_size
        return not ReferencePass(runner).check(text.prompt, generated, text.sampling, text.choice).accepted
    finally:
        runner.close()


def flipped_bit_is_seen(model_dir: Path, text: Heard) -> bool:
    """Whether one low bit, flipped in one slot of a pool after its KV was written, changes that slot's digest alone."""
    runner = _runner(model_dir, CONTROL_TOKENS + 1)
    try:
        tokens = np.resize(np.asarray(text.prompt, dtype=np.uint32), CONTROL_TOKENS)
        table = np.arange(-(-CONTROL_TOKENS // runner.kv_format.block_size), dtype=np.int32)
        runner.execute(StepPlan((SequenceStep(0, tokens, 0, table),)))
        kv = runner.kv_format
        piece = Piece(0, kv.num_layers, 0, CONTROL_TOKENS, 0, kv.num_kv_heads)
        buffer = bytearray(piece.num_bytes(kv.head_dim, kv.dtype))

        def digests() -> list[bytes]:
            runner.gather(piece, table, memoryview(buffer))
            return slot_digests(buffer, kv.num_layers, CONTROL_TOKENS)

        before = digests()
        buffer[0] ^= 1  # low bit of the first element: layer 0, K, token 0
        runner.scatter(piece, table, memoryview(buffer))
        after = digests()
        return [index for index in range(CONTROL_TOKENS) if before[index] != after[index]] == [0]
    finally:
        runner.close()


def _runner(model_dir: Path, max_model_len: int) -> TorchRunner:
    return TorchRunner(
        EngineSettings(
            model_dir,
            num_blocks=-(-max_model_len // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            max_model_len=max_model_len,
            threads=THREADS,
        )
    )
