"""From a checkpoint to a model of the library that is ready for its first step: a whole one, or one rank's part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from kvferry.engine.checkpoint import expected_shapes, open_checkpoint
from kvferry.engine.columns import MAX_STEP_ROWS
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.cache import NativeCache
from kvferry.engine.native.library import Library, Range, Shape
from kvferry.engine.native.model import NativeModel
from kvferry.engine.native.weights import stream
from kvferry.engine.ranks.shard import Shard
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.settings import QUANTIZATIONS, EngineSettings, resolved_max_model_len
from kvferry.runtime import mapped_memory, usable_cores

WARM_UP_ROWS: Final = (1, 8, 128)  # of one sequence; the blocks of the longest are set apart for it


def open_cache(
    library: Library,
    settings: EngineSettings,
    config: ModelConfig,
    shard: Shard,
    num_blocks: int,
    memory: SharedMemory | None,
    *,
    own: bool = True,
) -> NativeCache:
    """A shard's KV cache of `num_blocks` and those that a warm-up writes, in its own memory or in what ranks share; or,
    not its `own`, another rank's."""
    blocks = num_blocks + -(-max(WARM_UP_ROWS) // settings.block_size)
    shape = shape_of(settings, config, shard)
    mapped = mapped_memory if memory is None else partial(memory.own_cache if own else memory.cache, shard.rank)
    return NativeCache(library, shape, shard.kv_heads, blocks, mapped)


def load_model(
    library: Library,
    settings: EngineSettings,
    config: ModelConfig,
    shard: Shard,
    cache: NativeCache,
    memory: SharedMemory | None,
    progress: Callable[[float], None],
) -> NativeModel:
    """`cache`: the shard's own. `memory`: what the ranks share, None for a model that is whole."""
    model = NativeModel(library, shape_of(settings, config, shard), config)
    try:
        with open_checkpoint(settings.model_dir, expected_shapes(config)) as checkpoint:
            stream(checkpoint, config, shard, model.load, progress)
        model.finish(cache)
        if memory is not None:
            model.join(memory)
    except BaseException:
        model.close()
        raise
    return model


def shape_of(settings: EngineSettings, config: ModelConfig, shard: Shard) -> Shape:
    shape = Shape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_len=resolved_max_model_len(settings, config),
        block_size=settings.block_size,
        quantization=QUANTIZATIONS.index(settings.quantization),
        tied=config.tie_word_embeddings,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=config.qk_norm,
        threads=settings.threads or usable_cores(),
        rms_norm_eps=config.rms_norm_eps,
    )
    if shard.size > 1:
        shape.ranks, shape.rank, shape.max_rows = shard.size, shard.rank, MAX_STEP_ROWS
        for name in ("heads", "kv_heads", "hidden", "intermediate", "vocab"):
            setattr(shape, name, Range.of(getattr(shard, name)))
    return shape
