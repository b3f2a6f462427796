"""A rank of the native engine that is told its steps."""

from __future__ import annotations

import numpy as np

from kvferry.engine.columns import Columns
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import Library, open_library
from kvferry.engine.native.loading import load_model, open_cache
from kvferry.engine.ranks.shard import shards_of
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.settings import EngineSettings


class NativeFollower:
    """Implements `Follower`. Raises what `NativeRunner` does."""

    def __init__(
        self, settings: EngineSettings, rank: int, memory: SharedMemory, library: Library | None = None
    ) -> None:
        """`settings` are the leader's, with the number of blocks that it settled on."""
        assert settings.num_blocks is not None
        config = ModelConfig.read(settings.model_dir)
        library = library or open_library(settings.isa)
        shard = shards_of(config, settings.tensor_parallel_size)[rank]
        cache = open_cache(library, settings, config, shard, settings.num_blocks, memory)
        self._model = load_model(library, settings, config, shard, cache, memory, lambda share: None)
        self._no_logits = np.empty((0, config.vocab_size), np.float32)  # the leader gets them

    @property
    def weight_bytes(self) -> int:
        """Memory of this rank's packed weights."""
        return self._model.weight_bytes

    def step(self, columns: Columns, *, head: bool) -> None:
        self._model.step(columns, self._no_logits if head else None)

    def head(self, rows: range) -> None:
        self._model.logits(rows, self._no_logits)

    def close(self) -> None:
        self._model.close()
