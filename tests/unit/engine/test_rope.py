"""RoPE frequencies and tables against transformers: equal up to one unit in the last place of fp32 powers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import LINEAR, LLAMA3, YARN, Shape, build, config_of
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvferry.engine.bf16 import to_bf16
from kvferry.engine.config import ModelConfig
from kvferry.engine.rope import inverse_frequencies, rope_tables

KINDS: dict[str, dict[str, Any]] = {"default": {}, "linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(tmp_path: Path, kind: str, head_dim: int) -> None:
    shape = Shape(kind, "llama", 2, 1, head_dim, fields=KINDS[kind])
    config = ModelConfig.read(build(shape, tmp_path))
    theirs = LlamaRotaryEmbedding(config_of(shape))
    expected = theirs.inv_freq.numpy()
    np.testing.assert_array_max_ulp(inverse_frequencies(config.rope, head_dim), expected, maxulp=4)
    length = 256
    cos, sin = rope_tables(config.rope, head_dim, length)
    their_cos, their_sin = theirs(torch.zeros(1, dtype=torch.bfloat16), torch.arange(length)[None])
    for found, wanted in ((cos, their_cos), (sin, their_sin)):
        bits = wanted[0, :, : head_dim // 2].contiguous().view(torch.uint16).numpy()
        # A value near the middle of two bf16 numbers may fall to either side.
        assert (to_bf16(found) != bits).mean() < 2e-3
    # Negative control: another base is far off.
    assert (to_bf16(np.roll(cos, 1, axis=0)) != to_bf16(cos)).mean() > 0.1
