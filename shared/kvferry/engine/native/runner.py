"""`NativeRunner`: a checkpoint run by the native library, on a CPU, in bf16 or int8.

`execute` is plan -> one call of the library (rows, KV, logits of the rows that draw) -> one draw of all tokens.

Exact: a row's bits depend on that row alone. In every output the products are summed in one order, whatever else is
in the step, so batch, chunk, cached prefix, block table and number of threads leave no trace in KV or logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvferry.engine.bf16 import Floats
from kvferry.engine.checkpoint import expected_shapes, open_checkpoint
from kvferry.engine.choice import obstacle
from kvferry.engine.config import ModelConfig
from kvferry.engine.drawing import draws_of, result_of
from kvferry.engine.limits import Limits
from kvferry.engine.native.library import Library, Shape, Wanted, open_library
from kvferry.engine.native.model import NativeModel
from kvferry.engine.native.sampler import NativeSampler
from kvferry.engine.native.weights import stream
from kvferry.engine.settings import (
    QUANTIZATIONS,
    EngineSettings,
    kv_format_of,
    resolved_dtype,
    resolved_max_model_len,
    resolved_num_blocks,
)
from kvferry.errors import SettingError
from kvferry.runtime import blocking_clock
from kvferry.schedule.step import BlockTable, KVFormat, SequenceStep, StepPlan, StepResult
from kvferry.wire.frame import Piece

ENGINE_VERSION: Final = "1"  # of the order of operations: a change of bits is a new version
WARM_UP_ROWS: Final = (1, 8, 128)  # of one sequence; the blocks of the longest are set apart for it
WARM_UP_STREAMS: Final = (1, 2, 4, 8)


class NativeRunner:
    """Implements `ModelRunner`.

    Raises `CheckpointError`, `SettingError` or `LibraryUnavailable` when it is made. `library` spares finding it
    again. `progress` gets the share of the weights that are loaded, 0 to 1.
    """

    exact = True

    def __init__(
        self,
        settings: EngineSettings,
        progress: Callable[[float], None] | None = None,
        library: Library | None = None,
    ) -> None:
        settings.check_positive()
        self.config = config = ModelConfig.read(settings.model_dir)
        if found := obstacle(settings, config):
            raise SettingError(*found)
        self._quantization = settings.quantization
        self._library = library or open_library(settings.isa)
        self._max_model_len = resolved_max_model_len(settings, config)
        self._kv_format = kv_format_of(settings, config, resolved_dtype(settings, config))
        self._num_blocks = resolved_num_blocks(settings, self._kv_format)
        self._limits = Limits(self._kv_format, self._num_blocks, self._max_model_len, config.vocab_size)
        self._model = NativeModel(self._library, _shape(settings, config, self._max_model_len), config)
        self._sampler = NativeSampler(self._library.c, config.vocab_size, self._model.handle)
        self._logits = np.empty((0, config.vocab_size), np.float32)
        try:
            with open_checkpoint(settings.model_dir, expected_shapes(config)) as checkpoint:
                stream(checkpoint, config, self._model.load, progress or (lambda share: None))
            warm_up_blocks = -(-max(WARM_UP_ROWS) // settings.block_size)
            self._scratch = np.arange(self._num_blocks, self._num_blocks + warm_up_blocks, dtype=np.int32)
            self._model.finish(self._num_blocks + warm_up_blocks)
        except BaseException:
            self._model.close()
            raise

    @property
    def kv_format(self) -> KVFormat:
        return self._kv_format

    @property
    def numerics_id(self) -> str:
        return f"native{ENGINE_VERSION}-{self._library.isa}-{self._kv_format.dtype}-{self._quantization}"

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.config.eos_token_ids

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights. The head of a tied model is its embedding: there is no second copy."""
        return self._model.weight_bytes

    def execute(self, plan: StepPlan) -> StepResult:
        started = blocking_clock()
        self._limits.check_plan(plan)
        drawing = draws_of(plan)
        logits = self._room(len(drawing))
        wanted = [Wanted.NONE if step.draw is None else Wanted.LAST for step in plan.steps]
        self._model.step(plan.steps, wanted, logits)
        drawn = self._sampler.sample(logits, list(drawing.values()))
        return result_of(plan, drawing, drawn, blocking_clock() - started)

    def logits(self, plan: StepPlan) -> list[Floats]:
        """Run the plan's forward pass and return all rows' logits, [num_rows, vocab] for each SequenceStep.

        The same pass as `execute`; for teacher forcing (`reference.py`) and tests.
        """
        self._limits.check_plan(plan)
        logits = np.empty((plan.num_tokens, self.vocab_size), np.float32)
        self._model.step(plan.steps, [Wanted.ALL] * len(plan.steps), logits)
        ends = np.cumsum([len(step.tokens) for step in plan.steps])
        return np.split(logits, ends[:-1])

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._limits.check_piece(piece, block_table, out.nbytes)
        self._model.gather(piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._limits.check_piece(piece, block_table, payload.nbytes)
        self._model.scatter(piece, block_table, payload)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, all layers, each (from, to), in order. May run beside a step, as `gather` may."""
        blocks = [block for pair in pairs for block in pair]
        if blocks and not 0 <= min(blocks) <= max(blocks) < self._num_blocks:
            raise RuntimeError(f"a copy names a block outside the pool of {self._num_blocks}")
        self._model.copy_blocks(np.asarray(blocks, np.int32))

    def warm_up(self) -> None:
        """Touch code, weights and workspace at common shapes. Writes into blocks that are set apart for it."""
        plans = [StepPlan((self._scratch_step(min(rows, self._max_model_len)),)) for rows in WARM_UP_ROWS]
        for count in WARM_UP_STREAMS:
            tables = self._scratch[:count, None]  # a block each: sequences that write share none
            plans.append(StepPlan(tuple(SequenceStep(0, np.zeros(1, np.uint32), 0, table) for table in tables)))
        for plan in plans:
            logits = self._room(len(plan.steps))
            self._model.step(plan.steps, [Wanted.LAST] * len(plan.steps), logits)

    def close(self) -> None:
        self._model.close()
        self._logits = np.empty((0, self.vocab_size), np.float32)

    def _scratch_step(self, rows: int) -> SequenceStep:
        return SequenceStep(0, np.zeros(rows, np.uint32), 0, self._scratch)

    def _room(self, rows: int) -> Floats:
        """Memory for logits [rows, vocab] that is used again by every step."""
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.vocab_size), np.float32)
        return self._logits[:rows]


def _shape(settings: EngineSettings, config: ModelConfig, max_len: int) -> Shape:
    return Shape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_len=max_len,
        block_size=settings.block_size,
        quantization=QUANTIZATIONS.index(settings.quantization),
        tied=config.tie_word_embeddings,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=config.qk_norm,
        threads=settings.threads or len(os.sched_getaffinity(0)),
        rms_norm_eps=config.rms_norm_eps,
    )
