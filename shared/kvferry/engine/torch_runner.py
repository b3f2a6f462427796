"""The portable engine: a Hugging Face checkpoint run by torch, on a CPU or on CUDA.

`execute` is plan -> rows -> hidden states -> logits of the rows that draw -> tokens. Each step of that is one
file: `batch.py`, `model.py` (with `attention.py`, `kv_cache.py`), `sampler.py`.

Not exact: oneDNN and the batched products choose their kernel by shape, so a row's low bits depend on what it
was batched with. Workers that run this are compared by the reference pass (`reference.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from kvferry.engine.batch import Batch, prepare
from kvferry.engine.checkpoint import weights_fingerprint
from kvferry.engine.config import DTYPES, ModelConfig
from kvferry.engine.kv_cache import KVCache
from kvferry.engine.limits import Limits
from kvferry.engine.linear import linear_class
from kvferry.engine.loader import load_weights
from kvferry.engine.model import Model
from kvferry.engine.sampler import draw, is_greedy
from kvferry.errors import SettingError
from kvferry.runtime import blocking_clock
from kvferry.schedule.step import BlockTable, KVFormat, SequenceStep, StepPlan, StepResult
from kvferry.wire.frame import Piece

ENGINE_VERSION: Final = "1"  # of the order of operations: a change of bits is a new version
DEFAULT_KV_CACHE_BYTES: Final = 1 << 30
WARM_UP_ROWS: Final = (1, 2, 4, 8, 256)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What a torch runner is made from. `num_blocks` wins over `kv_cache_bytes`."""

    model_dir: Path
    device: str = "cpu"
    dtype: str = "auto"  # "auto": the checkpoint's own
    num_blocks: int | None = None
    kv_cache_bytes: int = DEFAULT_KV_CACHE_BYTES
    block_size: int = 16
    max_model_len: int | None = None  # None: what the model was made for
    threads: int | None = None  # None: torch decides


class TorchRunner:
    """Implements `ModelRunner`. Raises `CheckpointError` or `SettingError` when it is made."""

    exact = False

    def __init__(self, settings: EngineSettings, progress: Callable[[float], None] | None = None) -> None:
        if settings.threads is not None:
            _check_positive("threads", settings.threads)
            torch.set_num_threads(settings.threads)
        _check_positive("block_size", settings.block_size)
        self.config = config = ModelConfig.read(settings.model_dir)
        self._device = _device(settings.device)
        self._dtype_name = _dtype_name(settings.dtype, config.dtype)
        self._dtype: torch.dtype = getattr(torch, self._dtype_name)
        self._max_model_len = _max_model_len(settings.max_model_len, config)
        with torch.inference_mode():
            weights = load_weights(
                settings.model_dir, config, self._dtype, self._device, progress or (lambda share: None)
            )
            self._model = Model(config, weights, self._max_model_len, self._dtype, self._device)
            self._kv_format = KVFormat(
                config.num_layers, config.num_kv_heads, config.head_dim, self._dtype_name,
                settings.block_size, self._format_id(settings),
            )  # fmt: skip
        self._cache = KVCache(self._kv_format, _num_blocks(settings, self._kv_format), self._dtype, self._device)
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
        with torch.inference_mode():
            batch, hidden = self._forward(plan)
            drawing = [index for index, step in enumerate(plan.steps) if step.draw is not None]
            tokens: list[int | None] = [None] * len(plan.steps)
            if drawing:
                last_rows = torch.tensor([batch.rows[index].stop - 1 for index in drawing], device=self._device)
                logits = self._model.logits(hidden.index_select(0, last_rows))
                drawn = _draw_all(logits, [plan.steps[index] for index in drawing])
                for index, token in zip(drawing, drawn, strict=True):
                    tokens[index] = token
        return StepResult(tuple(tokens), blocking_clock() - started)

    def logits(self, plan: StepPlan) -> list[torch.Tensor]:
        """Run the plan's forward pass and return all rows' logits, [num_rows, vocab] for each SequenceStep.

        The same pass as `execute`; for teacher forcing (`reference.py`) and tests.
        """
        with torch.inference_mode():
            batch, hidden = self._forward(plan)
            return [self._model.logits(hidden[rows.start : rows.stop]) for rows in batch.rows]

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

    def _format_id(self, settings: EngineSettings) -> str:
        config = self.config
        identity = (
            weights_fingerprint(settings.model_dir), self._dtype_name, settings.block_size, config.rope,
            config.num_layers, config.num_kv_heads, config.head_dim, config.windows, config.rms_norm_eps,
        )  # fmt: skip
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _draw_all(logits: torch.Tensor, steps: Sequence[SequenceStep]) -> list[int]:
    """`logits` [num_draws, vocab]. Greedy rows share one argmax, which takes the lower id of equal logits."""
    best: list[int] = []
    if any(step.draw is not None and is_greedy(step.draw.sampling) for step in steps):
        best = logits.argmax(-1).tolist()
    tokens = []
    for row, step in enumerate(steps):
        assert step.draw is not None
        if is_greedy(step.draw.sampling):
            tokens.append(best[row])
        else:
            wide = logits[row].float().cpu().numpy()
            tokens.append(draw(wide, step.draw.sampling, step.draw.choice, step.draw.index))
    return tokens


def _check_positive(setting: str, value: int) -> None:
    if value < 1:
        raise SettingError(setting, f"{value} is not positive")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError("device", f"{name!r} is not a torch device") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise SettingError("device", f"{name!r} is not available here")
    return device


def _dtype_name(wanted: str, stored: str) -> str:
    name = stored if wanted == "auto" else wanted
    if name not in DTYPES:
        raise SettingError("dtype", f"{wanted!r}, supported: auto, {', '.join(DTYPES)}")
    return name


def _max_model_len(wanted: int | None, config: ModelConfig) -> int:
    if wanted is None:
        return config.max_context
    _check_positive("max_model_len", wanted)
    if wanted > config.max_context:
        raise SettingError("max_model_len", f"{wanted}, the model's context is {config.max_context}")
    return wanted


def _num_blocks(settings: EngineSettings, kv_format: KVFormat) -> int:
    if settings.num_blocks is not None:
        _check_positive("num_blocks", settings.num_blocks)
        return settings.num_blocks
    block_bytes = kv_format.token_bytes * kv_format.block_size
    if settings.kv_cache_bytes < block_bytes:
        raise SettingError("kv_cache_bytes", f"{settings.kv_cache_bytes}, one block takes {block_bytes}")
    return settings.kv_cache_bytes // block_bytes
