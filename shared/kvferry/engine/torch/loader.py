"""Weights from a checkpoint in the form that the model computes with: merged, converted, packed.

Tensors are read one by one and freed when they are packed, so that the peak is the packed model and one
merged projection.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kvferry.engine.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from kvferry.engine.config import ModelConfig
from kvferry.engine.ranks.shard import Shard
from kvferry.engine.torch.linear import Linear, linear_class
from kvferry.engine.torch.model import Layer, Weights

Progress = Callable[[float], None]  # share of the weights that is loaded, 0 to 1


def load_weights(
    directory: Path, config: ModelConfig, shard: Shard, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Weights:
    """A shard's rows of every tensor; nothing else is read.

    Raises `CheckpointError`, naming file and tensor, before any memory is taken for weights.
    """
    with open_checkpoint(directory, expected_shapes(config)) as checkpoint:
        return _Loader(checkpoint, config, shard, dtype, device, progress).load()


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._shard = shard
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._linear_class = linear_class(device, dtype)

    def load(self) -> Weights:
        config = self._config
        layers = []
        embedding = self._tensor("model.embed_tokens.weight")
        for index in range(config.num_layers):
            layers.append(self._layer(f"model.layers.{index}"))
            self._progress((index + 1) / (config.num_layers + 1))
        # A tied head is packed from the embedding, which stays for the lookup.
        tied = config.tie_word_embeddings
        head = self._linear_class(embedding, None) if tied else self._linear(["lm_head"])
        self._progress(1.0)
        return Weights(embedding, tuple(layers), self._tensor("model.norm.weight"), head)

    def _layer(self, prefix: str) -> Layer:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        config, shard = self._config, self._shard
        qk_norm = None
        if config.qk_norm:
            query, key = self._tensor(f"{attention}.q_norm.weight"), self._tensor(f"{attention}.k_norm.weight")
            qk_norm = torch.cat(
                (query.expand(len(shard.heads), -1), key.expand(len(shard.kv_heads), -1))
            )  # [num_heads + num_kv_heads, head_dim]
        return Layer(
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight"),
            qkv=self._linear([f"{attention}.{name}_proj" for name in "qkv"], config.qkv_bias),
            qk_norm=qk_norm,
            output=self._linear([f"{attention}.o_proj"], config.output_bias),
            post_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], config.mlp_bias),
            down=self._linear([f"{mlp}.down_proj"], config.mlp_bias),
        )

    def _tensor(self, name: str) -> torch.Tensor:
        """The shard's rows of it."""
        rows = self._shard.rows(name, self._config)
        stored = self._checkpoint.tensor(name) if rows is None else self._checkpoint.rows(name, rows)
        tensor = torch.from_numpy(stored)
        if stored.dtype == np.uint16:
            tensor = tensor.view(torch.bfloat16)  # it is kept as its bits
        return tensor.to(device=self._device, dtype=self._dtype)

    def _linear(self, names: list[str], bias: bool = False) -> Linear:
        """One projection out of rows of several with the same input."""
        weight = self._merged("weight", names)
        return self._linear_class(weight, self._merged("bias", names) if bias else None)

    def _merged(self, kind: str, names: list[str]) -> torch.Tensor:
        parts = [self._tensor(f"{name}.{kind}") for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
