"""`NativeRunner`: a checkpoint run by the native library, on a CPU, in bf16 or int8.

`execute` is plan -> one call of the library (rows, KV, logits of the rows that draw) -> one draw of all tokens.

Exact: a row's bits depend on that row alone. In every output the products are summed in one order, whatever else is
in the step, so batch, chunk, cached prefix, block table, number of threads and number of ranks leave no trace in KV
or logits.

With several ranks this is the leader: it tells the others each step (`ranks/`), all compute it together, and it alone
samples. The KV of all ranks lies in memory that it has mapped, so it copies from and to it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from kvferry.engine.bf16 import Floats
from kvferry.engine.choice import obstacle
from kvferry.engine.columns import Columns
from kvferry.engine.config import ModelConfig
from kvferry.engine.limits import Limits
from kvferry.engine.native.cache import gather, scatter
from kvferry.engine.native.library import Library, Wanted, open_library
from kvferry.engine.native.loading import WARM_UP_ROWS, load_model, open_cache
from kvferry.engine.native.sampler import NativeSampler
from kvferry.engine.ranks.followers import Followers, Head, Step
from kvferry.engine.ranks.shard import shards_of
from kvferry.engine.sampling.drawing import draws_of, result_of
from kvferry.engine.scoring import joined, pieces, scored_of
from kvferry.engine.settings import (
    EngineSettings,
    kv_format_of,
    resolved_dtype,
    resolved_max_model_len,
    resolved_num_blocks,
)
from kvferry.errors import SettingError
from kvferry.runtime import blocking_clock
from kvferry.schedule.step import BlockTable, KVFormat, KVStore, Score, SequenceStep, StepPlan, StepResult
from kvferry.wire.frame import Piece
from kvferry.wire.logprobs import PromptLogprobs

ENGINE_VERSION: Final = "1"  # of the order of operations: a change of bits is a new version
WARM_UP_STREAMS: Final = (1, 2, 4, 8)


class NativeRunner:
    """Implements `ModelRunner`.

    Raises `CheckpointError`, `SettingError` or `LibraryUnavailable` when it is made. `library` spares finding it
    again. `progress` gets the share of the weights that are loaded, 0 to 1. `followers` are the other ranks, set up
    here and told here; their processes are the caller's.
    """

    exact = True

    def __init__(
        self,
        settings: EngineSettings,
        progress: Callable[[float], None] | None = None,
        library: Library | None = None,
        followers: Followers | None = None,
    ) -> None:
        settings.check_positive()
        self.config = config = ModelConfig.read(settings.model_dir)
        if found := obstacle(settings, config):
            raise SettingError(*found)
        shards = shards_of(config, settings.tensor_parallel_size)
        assert len(shards) == (1 if followers is None else followers.size)
        self._followers = followers
        self._quantization = settings.quantization
        self._library = library or open_library(settings.isa)
        self._max_model_len = resolved_max_model_len(settings, config)
        self._kv_format = kv_format_of(settings, config, resolved_dtype(settings, config))
        self._num_blocks = resolved_num_blocks(settings, self._kv_format)
        self._limits = Limits(self._kv_format, self._num_blocks, self._max_model_len, config.vocab_size)
        memory = None
        if followers is not None:
            memory = followers.memory
            settled = replace(settings, num_blocks=self._num_blocks, isa=self._library.isa)
            followers.set_up("native", settled.as_fields())
        self._caches = [
            open_cache(self._library, settings, config, shard, self._num_blocks, memory, own=shard.rank == 0)
            for shard in shards
        ]
        self._scratch = np.arange(self._num_blocks, self._caches[0].num_blocks, dtype=np.int32)
        self._model = load_model(
            self._library, settings, config, shards[0], self._caches[0], memory, progress or (lambda share: None)
        )
        self._sampler = NativeSampler(self._library.c, config.vocab_size, self._model.handle)
        self._logits = np.empty((0, config.vocab_size), np.float32)
        self._scored_logits = self._logits
        try:
            self.rank_weight_bytes = [self._model.weight_bytes, *([] if followers is None else followers.ready())]
        except BaseException:
            self._model.close()
            raise

    @property
    def kv_format(self) -> KVFormat:
        return self._kv_format

    @property
    def heads(self) -> range:
        return self._kv_format.all_heads

    @property
    def here(self) -> KVStore:
        return self  # its ranks share a host

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
        """Memory of the packed weights of all ranks. The head of a tied model is its embedding: there is no second
        copy."""
        return sum(self.rank_weight_bytes)

    def execute(self, plan: StepPlan) -> StepResult:
        started = blocking_clock()
        self._limits.check_plan(plan)
        drawing, scored = draws_of(plan), scored_of(plan)
        logits = self._room(len(drawing))
        wanted = [Wanted.NONE if step.draw is None else Wanted.LAST for step in plan.steps]
        if scored:
            found = self._score(plan, scored, logits)
        else:
            self._step(plan.steps, wanted, logits)
            found = {}
        drawn = self._sampler.sample(logits, list(drawing.values()))
        return result_of(plan, drawing, drawn, blocking_clock() - started, found)

    def _score(self, plan: StepPlan, scored: Mapping[int, SequenceStep], logits: Floats) -> dict[int, PromptLogprobs]:
        """A step with rows to score; `logits` [draws, vocab] is filled. Those of all rows are never there at once."""
        wanted = [
            Wanted.ALL if index in scored else Wanted.NONE if step.draw is None else Wanted.LAST
            for index, step in enumerate(plan.steps)
        ]
        self._step(plan.steps, wanted, None)
        found: dict[int, PromptLogprobs] = {}
        drawing: list[int] = []  # of the wanted rows
        end = 0
        for index, step in enumerate(plan.steps):
            first = end
            end += len(step.tokens) if index in scored else 0 if step.draw is None else 1
            if step.draw is not None:
                drawing.append(end - 1)
            if step.score is not None:
                cut = pieces(step.scored_rows, self.vocab_size)
                found[index] = joined([self._score_rows(step, step.score, first, rows) for rows in cut])
        num_filled = 0
        for run in _runs(drawing):
            self._head(run, logits[num_filled : num_filled + len(run)])
            num_filled += len(run)
        return found

    def _score_rows(self, step: SequenceStep, score: Score, first: int, rows: range) -> PromptLogprobs:
        """Some rows of a sequence whose chunk begins at the wanted row `first`."""
        if len(self._scored_logits) < len(rows):
            self._scored_logits = np.empty((len(rows), self.vocab_size), np.float32)
        logits = self._scored_logits[: len(rows)]
        self._head(range(first + rows.start, first + rows.stop), logits)
        targets = score.targets[rows.start - score.first_row : rows.stop - score.first_row]
        return self._sampler.score(logits, targets, score.num_top, step.start + rows.start + 1)

    def logits(self, plan: StepPlan) -> list[Floats]:
        """Run the plan's forward pass and return all rows' logits, [num_rows, vocab] for each SequenceStep.

        The same pass as `execute`; for teacher forcing (`reference.py`) and tests.
        """
        self._limits.check_plan(plan)
        logits = np.empty((plan.num_tokens, self.vocab_size), np.float32)
        self._step(plan.steps, [Wanted.ALL] * len(plan.steps), logits)
        ends = np.cumsum([len(step.tokens) for step in plan.steps])
        return np.split(logits, ends[:-1])

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._limits.check_piece(piece, block_table, out.nbytes)
        gather(self._caches, piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._limits.check_piece(piece, block_table, payload.nbytes)
        scatter(self._caches, piece, block_table, payload)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, all layers, each (from, to), in order. May run beside a step, as `gather` may."""
        blocks = [block for pair in pairs for block in pair]
        if blocks and not 0 <= min(blocks) <= max(blocks) < self._num_blocks:
            raise RuntimeError(f"a copy names a block outside the pool of {self._num_blocks}")
        for cache in self._caches:
            cache.copy_blocks(np.asarray(blocks, np.int32))

    def warm_up(self) -> None:
        """Touch code, weights and workspace at common shapes. Writes into blocks that are set apart for it."""
        plans = [StepPlan((self._scratch_step(min(rows, self._max_model_len)),)) for rows in WARM_UP_ROWS]
        for count in WARM_UP_STREAMS:
            tables = self._scratch[:count, None]  # a block each: sequences that write share none
            plans.append(StepPlan(tuple(SequenceStep(0, np.zeros(1, np.uint32), 0, table) for table in tables)))
        for plan in plans:
            logits = self._room(len(plan.steps))
            self._step(plan.steps, [Wanted.LAST] * len(plan.steps), logits)

    def close(self) -> None:
        self._model.close()
        self._caches.clear()
        self._logits = self._scored_logits = np.empty((0, self.vocab_size), np.float32)

    def _step(self, steps: Sequence[SequenceStep], wanted: Sequence[Wanted], logits: Floats | None) -> None:
        """With all ranks. Without `logits` they are left to `_head`."""
        if not steps:
            return
        columns = Columns.of(steps, wanted)
        if self._followers is None:
            self._model.step(columns, logits)
            return
        with self._followers.told(Step(columns.message(), logits is not None)):
            self._model.step(columns, logits)

    def _head(self, rows: range, logits: Floats) -> None:
        """With all ranks: logits of some of the last step's wanted rows."""
        if self._followers is None:
            self._model.logits(rows, logits)
            return
        with self._followers.told(Head(rows.start, rows.stop)):
            self._model.logits(rows, logits)

    def _scratch_step(self, rows: int) -> SequenceStep:
        return SequenceStep(0, np.zeros(rows, np.uint32), 0, self._scratch)

    def _room(self, rows: int) -> Floats:
        """Memory for logits [rows, vocab] that is used again by every step."""
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.vocab_size), np.float32)
        return self._logits[:rows]


def _runs(rising: Sequence[int]) -> list[range]:
    """Rising numbers as runs of consecutive ones."""
    runs: list[range] = []
    for number in rising:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
