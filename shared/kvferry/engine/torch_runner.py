"""The portable engine: a Hugging Face checkpoint run by torch, on a CPU or on CUDA.

`execute` is plan -> rows -> hidden states -> logits of the rows that draw -> tokens. Each step of that is one
file: `batch.py`, `model.py` (with `attention.py`, `kv_cache.py`), `sampler.py`.

Not exact: oneDNN and the batched products choose their kernel by shape, so a row's low bits depend on what it
was batched with. Workers that run this are compared by the reference pass (`reference.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from kvferry.engine.batch import Batch, prepare
from kvferry.engine.bf16 import Floats
from kvferry.engine.config import ModelConfig
from kvferry.engine.drawing import draws_of, result_of
from kvferry.engine.kv_cache import KVCache
from kvferry.engine.limits import Limits
from kvferry.engine.linear import linear_class
from kvferry.engine.loader import load_weights
from kvferry.engine.model import Model
from kvferry.engine.sampler import sample
from kvferry.engine.settings import (
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

ENGINE_VERSION: Final = "2"  # of the order of operations: a change of bits is a new version
WARM_UP_ROWS: Final = (1, 2, 4, 8, 256)


class TorchRunner:
    """Implements `ModelRunner`. Raises `CheckpointError` or `SettingError` when it is made."""

    exact = False

    def __init__(self, settings: EngineSettings, progress: Callable[[float], None] | None = None) -> None:
        settings.check_positive()
        if settings.quantization != "none":
            raise SettingError("quantization", f"{settings.quantization!r}, the torch engine has none")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.config = config = ModelConfig.read(settings.model_dir)
        self._device = _device(settings.device)
        self._dtype_name = resolved_dtype(settings, config)
        self._dtype: torch.dtype = getattr(torch, self._dtype_name)
        self._max_model_len = resolved_max_model_len(settings, config)
        with torch.inference_mode():
            weights = load_weights(
                settings.model_dir, config, self._dtype, self._device, progress or (lambda share: None)
            )
            self._model = Model(config, weights, self._max_model_len, self._dtype, self._device)
        self._kv_format = kv_format_of(settings, config, self._dtype_name)
        self._cache = KVCache(
            self._kv_format, resolved_num_blocks(settings, self._kv_format), self._dtype, self._device
        )
        self._limits = Limits(self._kv_format, self._cache.num_blocks, self._max_model_len, config.vocab_size)

    @property
    def kv_format(self) -> KVFormat:
        return self._kv_format

    @property
    def numerics_id(self) -> str:
        kernel = linear_class(self._device, self._dtype).kernel
        if self._device.type == "cuda":
            unit = torch.cuda.get_device_name(self._device).replace(" ", "-")
        else:
            bf16 = "-bf16" if torch.cpu._is_avx512_bf16_supported() else ""
            unit = torch.backends.cpu.get_cpu_capability().lower() + bf16
        return f"torch{ENGINE_VERSION}-{torch.__version__}-{kernel}-{unit}-{self._dtype_name}"

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.config.eos_token_ids

    def execute(self, plan: StepPlan) -> StepResult:
        started = blocking_clock()
        if not plan.steps:
            return StepResult((), 0.0)
        wanted = draws_of(plan)
        logits = np.empty((0, self.vocab_size), np.float32)
        with torch.inference_mode():
            batch, hidden = self._forward(plan)
            if wanted:
                last_rows = torch.tensor([batch.rows[index].stop - 1 for index in wanted], device=self._device)
                logits = self._model.logits(hidden.index_select(0, last_rows)).float().cpu().numpy()
        drawn = sample(logits, list(wanted.values()))
        return result_of(plan, wanted, drawn, blocking_clock() - started)

    def logits(self, plan: StepPlan) -> list[Floats]:
        """Run the plan's forward pass and return all rows' logits, [num_rows, vocab] for each SequenceStep.

        The same pass as `execute`; for teacher forcing (`reference.py`) and tests.
        """
        with torch.inference_mode():
            batch, hidden = self._forward(plan)
            return [self._model.logits(hidden[rows.start : rows.stop]).float().cpu().numpy() for rows in batch.rows]

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._limits.check_piece(piece, block_table, out.nbytes)
        with torch.inference_mode():
            self._cache.gather(piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._limits.check_piece(piece, block_table, payload.nbytes)
        with torch.inference_mode():
            self._cache.scatter(piece, block_table, payload)

    def warm_up(self) -> None:
        """Build the kernels of the common batch shapes. Writes into the scratch block alone."""
        block_size = self._kv_format.block_size
        scratch = np.full(-(-max(WARM_UP_ROWS) // block_size), self._cache.scratch_block, np.int32)
        token = np.zeros(1, np.uint32)
        for count in WARM_UP_ROWS:
            decode = StepPlan(tuple(SequenceStep(0, token, 0, scratch) for _ in range(count)))
            rows = min(count, self._max_model_len)
            prefill = StepPlan((SequenceStep(0, np.zeros(rows, np.uint32), 0, scratch),))
            with torch.inference_mode():
                for plan in (decode, prefill) if count <= 8 else (prefill,):
                    batch = self._prepare(plan)
                    hidden = self._model.forward(batch, self._cache)
                    self._model.logits(hidden[: min(count, 8)])

    def close(self) -> None:
        self._cache.close()
        del self._model

    def _forward(self, plan: StepPlan) -> tuple[Batch, torch.Tensor]:
        self._limits.check_plan(plan)
        batch = self._prepare(plan)
        return batch, self._model.forward(batch, self._cache)

    def _prepare(self, plan: StepPlan) -> Batch:
        return prepare(
            plan, self._cache, self._kv_format.block_size, self.config.num_kv_heads,
            frozenset(self.config.windows), self._dtype, self._device,
        )  # fmt: skip


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError("device", f"{name!r} is not a torch device") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise SettingError("device", f"{name!r} is not available here")
    return device
