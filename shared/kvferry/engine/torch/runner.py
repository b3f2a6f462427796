"""The portable engine: a Hugging Face checkpoint run by torch, on a CPU or on CUDA.

`execute` is plan -> rows -> hidden states -> logits of the rows that draw -> tokens. Each step of that is one
file: `batch.py`, `model.py` (with `attention.py`, `kv_cache.py`), `sampling/`.

Not exact: oneDNN and the batched products choose their kernel by shape, so a row's low bits depend on what it
was batched with. Workers that run this are compared by the reference pass (`engine/reference.py`).

With several ranks this is the leader: it tells the others each step (`ranks/`), all compute it together, and it alone
samples. The KV of all ranks lies in memory that it has mapped, so it copies from and to it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
import torch

from kvferry.engine.bf16 import Floats
from kvferry.engine.columns import Columns, Wanted
from kvferry.engine.config import ModelConfig
from kvferry.engine.limits import Limits
from kvferry.engine.ranks.caches import Caches
from kvferry.engine.ranks.copies import RemoteCache
from kvferry.engine.ranks.followers import Followers, Head, Step
from kvferry.engine.ranks.shard import shards_of
from kvferry.engine.sampling.drawing import draws_of, result_of
from kvferry.engine.sampling.sampler import sample
from kvferry.engine.scoring import joined, pieces, scored_of
from kvferry.engine.settings import (
    EngineSettings,
    kv_format_of,
    resolved_dtype,
    resolved_max_model_len,
    resolved_num_blocks,
)
from kvferry.engine.torch.batch import Batch
from kvferry.engine.torch.collective import Alone, Collective
from kvferry.engine.torch.kv_cache import KVCache
from kvferry.engine.torch.leader import other_caches, set_up
from kvferry.engine.torch.linear import linear_class
from kvferry.engine.torch.rank import TorchRank, device_of, open_cache
from kvferry.engine.torch.scoring import score
from kvferry.errors import SettingError
from kvferry.runtime import blocking_clock
from kvferry.schedule.step import BlockTable, KVFormat, KVStore, SequenceStep, StepPlan, StepResult
from kvferry.wire.frame import Piece
from kvferry.wire.logprobs import PromptLogprobs

ENGINE_VERSION: Final = "2"  # of the order of operations: a change of bits is a new version
WARM_UP_ROWS: Final = (1, 2, 4, 8, 256)


class TorchRunner:
    """Implements `ModelRunner`. Raises `CheckpointError` or `SettingError` when it is made.

    `followers` are the other ranks, set up here and told here; their processes are the caller's.
    """

    exact = False

    def __init__(
        self,
        settings: EngineSettings,
        progress: Callable[[float], None] | None = None,
        followers: Followers | None = None,
    ) -> None:
        settings.check_positive()
        if settings.quantization != "none":
            raise SettingError("quantization", f"{settings.quantization!r}, the torch engine has none")
        self.config = config = ModelConfig.read(settings.model_dir)
        self._device = device_of(settings)
        self._dtype_name = resolved_dtype(settings, config)
        self._max_model_len = resolved_max_model_len(settings, config)
        shards = shards_of(config, settings.tensor_parallel_size)
        assert len(shards) == (1 if followers is None else followers.size)
        if settings.remote_ranks < len(shards) - 1 and self._device.type != "cpu":
            # Its ranks share no memory that the leader could map.
            raise SettingError(
                "remote_ranks",
                f"{settings.remote_ranks}, on {self._device.type} all ranks but the first join by `kvferry rank`",
            )
        self._followers = followers
        self._kv_format = kv_format_of(settings, config, self._dtype_name)
        num_blocks = resolved_num_blocks(settings, self._kv_format)
        self._limits = Limits(self._kv_format, num_blocks, self._max_model_len, config.vocab_size)
        collective: Collective = Alone()
        if followers is not None:
            collective = set_up(followers, settings, config, shards, num_blocks, self._kv_format)
        memory = None if followers is None else followers.memory
        own = open_cache(settings, config, shards[0], num_blocks, memory)
        self._caches: list[KVCache | RemoteCache] = [own]
        if followers is not None:
            self._caches += other_caches(followers, settings, config, shards, num_blocks, self._kv_format)
        self._whole = Caches(self._caches, self._limits)
        num_remote = settings.remote_ranks
        self.here: KVStore = Caches(self._caches[: len(shards) - num_remote], self._limits) if num_remote else self
        self._num_blocks, self._scratch_block = num_blocks, own.scratch_block
        self._rank = TorchRank(settings, config, shards, 0, own, collective, progress or (lambda share: None))
        self.rank_weight_bytes = [self._rank.weight_bytes, *([] if followers is None else followers.ready())]

    @property
    def kv_format(self) -> KVFormat:
        return self._kv_format

    @property
    def heads(self) -> range:
        return self._kv_format.all_heads

    @property
    def numerics_id(self) -> str:
        kernel = linear_class(self._device, getattr(torch, self._dtype_name)).kernel
        if self._device.type == "cuda":
            unit = torch.cuda.get_device_name(self._device).replace(" ", "-")
        else:
            bf16 = "-bf16" if torch.cpu._is_avx512_bf16_supported() else ""
            amx = "-amx" if torch.cpu._is_amx_tile_supported() else ""
            unit = torch.backends.cpu.get_cpu_capability().lower() + bf16 + amx
        ranks = len(self._caches)  # kernels are chosen by shape, so bits depend on it
        degree = f"-tp{ranks}" if ranks > 1 else ""
        return f"torch{ENGINE_VERSION}-{torch.__version__}-{kernel}-{unit}-{self._dtype_name}{degree}"

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

    def execute(self, plan: StepPlan) -> StepResult:
        started = blocking_clock()
        if not plan.steps:
            return StepResult((), 0.0)
        self._limits.check_plan(plan)
        wanted, scored = draws_of(plan), {}
        logits = np.empty((0, self.vocab_size), np.float32)
        with torch.inference_mode():
            batch, last = self._forward(plan.steps, list(wanted))
            if last is not None:
                logits = last.float().cpu().numpy()
            for index, step in scored_of(plan).items():
                scored[index] = self._score(step, batch.rows[index])
        drawn = sample(logits, list(wanted.values()))
        return result_of(plan, wanted, drawn, blocking_clock() - started, scored)

    def logits(self, plan: StepPlan) -> list[Floats]:
        """Run the plan's forward pass and return all rows' logits, [num_rows, vocab] for each SequenceStep.

        The same pass as `execute`; for teacher forcing (`reference.py`) and tests.
        """
        self._limits.check_plan(plan)
        with torch.inference_mode():
            batch, _ = self._forward(plan.steps, [])
            return [self._head(rows).float().cpu().numpy() for rows in batch.rows]

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._whole.gather(piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._whole.scatter(piece, block_table, payload)

    def warm_up(self) -> None:
        """Build the kernels of the common batch shapes. Writes into the scratch block alone."""
        block_size = self._kv_format.block_size
        scratch = np.full(-(-max(WARM_UP_ROWS) // block_size), self._scratch_block, np.int32)
        token = np.zeros(1, np.uint32)
        for count in WARM_UP_ROWS:
            decode = StepPlan(tuple(SequenceStep(0, token, 0, scratch) for _ in range(count)))
            rows = min(count, self._max_model_len)
            prefill = StepPlan((SequenceStep(0, np.zeros(rows, np.uint32), 0, scratch),))
            with torch.inference_mode():
                for plan in (decode, prefill) if count <= 8 else (prefill,):
                    self._forward(plan.steps, [])
                    self._head(range(min(count, 8)))

    def close(self) -> None:
        self._rank.close()
        for cache in self._caches:
            cache.close()

    def _score(self, step: SequenceStep, batch_rows: range) -> PromptLogprobs:
        """`batch_rows`: the sequence's rows in the step."""
        assert step.score is not None, "only sequences with rows to score"
        found, first = [], step.scored_rows.start
        for rows in pieces(step.scored_rows, self.vocab_size):
            targets = step.score.targets[rows.start - first : rows.stop - first]
            logits = self._head(range(batch_rows.start + rows.start, batch_rows.start + rows.stop))
            found.append(score(logits, targets, step.score.num_top, step.start + rows.start + 1))
        return joined(found)

    def _forward(self, steps: Sequence[SequenceStep], drawing: list[int]) -> tuple[Batch, torch.Tensor | None]:
        """With all ranks: the step's rows, and logits [drawing, vocab] of the last rows of the sequences that draw."""
        order = None
        if self._followers is not None:
            wanted = [Wanted.LAST if index in drawing else Wanted.NONE for index in range(len(steps))]
            order = Step(Columns.of(steps, wanted).message(), bool(drawing))
        with self._told(order):
            batch = self._rank.forward(steps)
            return batch, self._rank.last(batch, drawing) if drawing else None

    def _head(self, rows: range) -> torch.Tensor:
        """With all ranks: logits [num_rows, vocab] of rows of the last step, in the batch's order."""
        with self._told(Head(rows.start, rows.stop)):
            return self._rank.head(rows)

    def _told(self, order: Step | Head | None) -> AbstractContextManager[None]:
        if self._followers is None or order is None:
            return nullcontext()
        return self._followers.told(order)
