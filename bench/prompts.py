"""Prompts of an exact number of tokens, the same in every run. No two begin alike unless asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer

WORDS: Final = (
    *("river", "stone", "letter", "garden", "market", "winter", "engine", "bridge", "teacher", "window", "paper"),
    *("island", "forest", "music", "doctor", "kitchen", "station", "animal", "morning", "village", "silver"),
    *("ocean", "history", "picture", "harbour", "corner", "number", "summer", "journey", "mountain", "question"),
    *("evening", "neighbour", "library", "machine", "weather", "story", "captain", "colour", "sister"),
)


class Prompts:
    """Makes English-looking prompts for one model."""

    def __init__(self, model_dir: Path, seed: int = 1) -> None:
        self._tokenizer = Tokenizer(ModelDir(model_dir))
        self._random = np.random.default_rng(seed)
        self._made = 0

    def tokens(self, length: int, prefix: list[int] | None = None) -> list[int]:
        """`length` token ids. They start with `prefix`, or with a number that no other prompt starts with."""
        self._made += 1
        words = " ".join(self._random.choice(WORDS, size=length + 8).tolist())
        fresh = self._tokenizer.encode(f"{self._made:05d} {words}", add_special_tokens=False).tolist()
        return [*(prefix or []), *fresh][:length]
