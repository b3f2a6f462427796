"""The torch engine's model with its KV cache: all of it, or one rank's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kvferry.engine.columns import Columns, Wanted
from kvferry.engine.config import ModelConfig
from kvferry.engine.ranks.shard import Shard, shards_of
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.settings import EngineSettings, resolved_dtype, resolved_max_model_len
from kvferry.engine.torch.batch import Batch, prepare
from kvferry.engine.torch.collective import Collective, open_collective
from kvferry.engine.torch.kv_cache import KVCache
from kvferry.engine.torch.loader import load_weights
from kvferry.engine.torch.model import Model
from kvferry.errors import SettingError
from kvferry.schedule.step import KVFormat, SequenceStep


class TorchRank:
    """One step: `forward`, then `last` or `head` as often as wanted. Ranks make the same calls in the same order."""

    def __init__(
        self,
        settings: EngineSettings,
        config: ModelConfig,
        shards: Sequence[Shard],
        rank: int,
        cache: KVCache,
        collective: Collective,
        progress: Callable[[float], None],
    ) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._config = config
        self._shard = shards[rank]
        self._cache = cache
        self._block_size = settings.block_size
        self._device = device_of(settings)
        self._dtype = dtype_of(settings, config)
        with torch.inference_mode():
            weights = load_weights(settings.model_dir, config, self._shard, self._dtype, self._device, progress)
            max_len = resolved_max_model_len(settings, config)
            self._model = Model(config, shards, rank, weights, max_len, self._dtype, self._device, collective)
        self.weight_bytes = weights.num_bytes
        self._hidden = torch.empty(0, config.hidden_size, dtype=self._dtype)

    def forward(self, steps: Sequence[SequenceStep]) -> Batch:
        """Writes the KV of all rows and keeps their hidden states."""
        batch = prepare(
            steps, self._cache, self._block_size, len(self._shard.kv_heads), frozenset(self._config.windows),
            self._dtype, self._device,
        )  # fmt: skip
        self._hidden = self._model.forward(batch, self._cache)
        return batch

    def last(self, batch: Batch, sequences: Sequence[int]) -> torch.Tensor:
        """Logits [num_sequences, vocab] after the last rows of some sequences, by their places in the step."""
        rows = torch.tensor([batch.rows[index].stop - 1 for index in sequences], device=self._device)
        return self._model.logits(self._hidden.index_select(0, rows))

    def head(self, rows: range) -> torch.Tensor:
        """Logits [num_rows, vocab] of some rows of the last step, in the batch's order."""
        return self._model.logits(self._hidden[rows.start : rows.stop])

    def close(self) -> None:
        self._cache.close()
        del self._model


class TorchFollower:
    """Implements `Follower`: rows of `head` are those of the batch. Raises what `TorchRunner` does."""

    def __init__(
        self, settings: EngineSettings, rank: int, memory: SharedMemory | None, collective: Collective | None = None
    ) -> None:
        """`settings` are the leader's, with the number of blocks that it settled on. `memory`: None on another host."""
        assert settings.num_blocks is not None
        config = ModelConfig.read(settings.model_dir)
        shards = shards_of(config, settings.tensor_parallel_size)
        self.cache = open_cache(settings, config, shards[rank], settings.num_blocks, memory)
        if collective is None:
            assert memory is not None
            collective = open_collective(memory, rank, len(shards))
        self._rank = TorchRank(settings, config, shards, rank, self.cache, collective, lambda share: None)

    @property
    def weight_bytes(self) -> int:
        return self._rank.weight_bytes

    def step(self, columns: Columns, *, head: bool) -> None:
        with torch.inference_mode():
            batch = self._rank.forward(columns.steps())
            if head:
                self._rank.last(batch, [i for i, wanted in enumerate(columns.wanted) if wanted == Wanted.LAST])

    def head(self, rows: range) -> None:
        with torch.inference_mode():
            self._rank.head(rows)

    def close(self) -> None:
        self._rank.close()


def open_cache(
    settings: EngineSettings,
    config: ModelConfig,
    shard: Shard,
    num_blocks: int,
    memory: SharedMemory | None,
    *,
    own: bool = True,
) -> KVCache:
    """A shard's KV cache, in memory of its own or in what ranks share; or, not its `own`, another rank's."""
    name, dtype = resolved_dtype(settings, config), dtype_of(settings, config)
    shape = KVFormat(config.num_layers, config.num_kv_heads, config.head_dim, name, settings.block_size, format_id="")
    mapped = None if memory is None else partial(memory.own_cache if own else memory.cache, shard.rank)
    return KVCache(shape, shard.kv_heads, num_blocks, dtype, device_of(settings), mapped)


def dtype_of(settings: EngineSettings, config: ModelConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, resolved_dtype(settings, config))
    return dtype


def device_of(settings: EngineSettings) -> torch.device:
    """Raises `SettingError` for a device that is not here."""
    name = settings.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError("device", f"{name!r} is not a torch device") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise SettingError("device", f"{name!r} is not available here")
    return device
