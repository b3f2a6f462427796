"""bfloat16 by numpy is bfloat16 by torch."""

from __future__ import annotations

import numpy as np
import torch

from kvferry.engine.bf16 import from_bf16, to_bf16


def test_every_kind_of_float_rounds_as_in_torch() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    ties = (generator.integers(0, 1 << 16, 4096, dtype=np.uint32) << 16) | 0x8000
    edges = np.asarray([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x7F800001, 0xFFFFFFFF], np.uint32)
    values = np.concatenate((bits, ties, ties ^ 1, ties - 1, edges)).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    found = to_bf16(values)
    numbers = ~np.isnan(values)
    assert np.array_equal(found[numbers], expected[numbers])
    assert np.isnan(from_bf16(found[~numbers])).all()
    assert np.array_equal(from_bf16(found[numbers]), torch.from_numpy(values).bfloat16().float().numpy()[numbers])
