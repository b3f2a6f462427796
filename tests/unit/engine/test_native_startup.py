"""A native worker never imports torch: not to load, not to step, not to hand KV over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runners import native_library

LOAD_AND_STEP = """
import json, sys
import numpy as np
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.frame import Piece
from kvferry.wire.sampling import Sampling
from kvferry.worker.engine import load_engine, warm_up
from kvferry_decode.settings import DecodeSettings

loaded = load_engine(DecodeSettings(model=sys.argv[1], max_model_len=512, num_blocks=64, engine=sys.argv[2]))
warm_up(loaded)
runner = loaded.runner
tokens = np.arange(100, 140, dtype=np.uint32)
table = np.arange(3, dtype=np.int32)
step = SequenceStep(0, tokens, 0, table, Draw(Sampling(temperature=0.8, top_p=0.9, seed=1), 0, 0))
drawn = runner.execute(StepPlan((step,))).tokens
piece = Piece(0, runner.kv_format.num_layers, 0, 40, 0, runner.kv_format.num_kv_heads)
runner.gather(piece, table, memoryview(bytearray(piece.num_bytes(runner.kv_format.head_dim, runner.kv_format.dtype))))
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "safetensors", "transformers"})
print(json.dumps({"engine": loaded.choice.engine, "drawn": drawn, "heavy": heavy}))
"""


def run(model_dir: Path, engine: str) -> dict[str, object]:
    command = [sys.executable, "-c", LOAD_AND_STEP, str(model_dir), engine]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    said: dict[str, object] = json.loads(output.splitlines()[-1])
    return said


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_a_native_worker_never_imports_torch(model_dir: Path, engine: str) -> None:
    native_library()
    said = run(model_dir, engine)
    assert said["engine"] == "native"
    assert said["heavy"] == []


def test_the_same_program_on_the_torch_engine_shows_it(model_dir: Path) -> None:
    said = run(model_dir, "torch")
    assert said["engine"] == "torch"
    assert "torch" in said["heavy"]  # type: ignore[operator]
