"""What a rank's part of a model is, so that one on another host can tell whether it has its leader's.

The leader reads whole checkpoints, for the id of its KV format. A rank reads its own rows: so the leader tells it what
these must be, by its own files, and it compares before it loads. What a rank never reads may differ: nothing is
computed from it.
"""

from __future__ import annotations

from kvferry.engine.checkpoint import expected_shapes, open_checkpoint
from kvferry.engine.config import ModelConfig
from kvferry.engine.ranks.shard import Shard
from kvferry.engine.settings import EngineSettings, identity_of


def part_id(settings: EngineSettings, config: ModelConfig, dtype: str, shard: Shard) -> str:
    """Equal where a shard's weights, and all that `identity_of` names, are. Reads the shard's rows of every tensor.

    Raises `CheckpointError`.
    """
    shapes = expected_shapes(config)
    with open_checkpoint(settings.model_dir, shapes) as checkpoint:
        weights = checkpoint.fingerprint({name: shard.rows(name, config) for name in shapes})
    return identity_of(weights, settings, config, dtype)
