"""What every benchmark is told."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from bench.report import Report
from kvferry.text.fetch import fetch_model

MODEL_NAME: Final = "smollm2"


@dataclass(frozen=True, slots=True)
class Options:
    model_dir: Path
    quick: bool = False  # fewer samples: to see that a benchmark runs, not to quote its figures
    minutes: float = 10.0  # of faults, for `chaos`
    peers: Path | None = None  # folder with `interference.py`, an independent client for the same measurement

    @classmethod
    def from_environment(cls, quick: bool, minutes: float) -> Options:
        """KVFERRY_TEST_MODEL names the model, else the default one is fetched; PEERS names the peers' scripts."""
        model = os.environ.get("KVFERRY_TEST_MODEL")
        peers = os.environ.get("PEERS")
        return cls(
            Path(model) if model else fetch_model(MODEL_NAME, progress=lambda stage, done, total: None),
            quick,
            minutes,
            Path(peers) if peers else None,
        )


Benchmark: TypeAlias = Callable[[Options], Awaitable[Report]]
