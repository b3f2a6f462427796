"""Token masks of structured output: the library that is used beside the one that is not, and what masks cost a step.

    compile   ms from a JSON schema to the first mask
    mask      µs of one mask, over instances of every schema, token by token, as the vocabulary splits them
    coverage  of the schemas in `grammar_cases.py`: how many are *followed* (every instance passes, nothing else does),
              *refused* (an error says so), *loosened* (something passes that is no instance), *narrowed* (an instance
              passes neither compact nor with spaces)
    step      of the native engine, with masks made on a thread beside it ÷ without; one step of each in turn

Without xgrammar (`pip install 'kvferry[rivals]'`, with triton) there is no comparison, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import tokenizers

from bench.grammar_cases import CASES, Case
from bench.grammar_rivals import LLGuidance, Matcher, Refused, Rival, XGrammar
from bench.grammar_steps import STREAMS, Steps
from bench.report import Report, percentile
from kvferry.engine.config import ModelConfig

MAX_STEP_SHARE: Final = 0.05  # of a step, for its masks
ROUNDS: Final = 3
OUTCOMES: Final = ("followed", "refused", "loosened", "narrowed")


@dataclass(slots=True)
class Score:
    """What one library made of the cases. Seconds."""

    outcomes: dict[str, str] = field(default_factory=dict)
    compiling: dict[str, float] = field(default_factory=dict)
    masks: list[float] = field(default_factory=list)

    def take(self, rival: Rival, case: Case, encode: Any, words: np.ndarray) -> None:
        """Compile a case anew for each text: libraries keep what they learnt, and the first request has none of it."""
        self.outcomes[case.name] = "followed"
        for instance, is_right in [*((text, True) for text in case.right), *((text, False) for text in case.wrong)]:
            began = time.perf_counter()
            try:
                rival.compile(case.schema).mask(words)
            except Refused:
                self.outcomes[case.name] = "refused"
                return
            seconds = time.perf_counter() - began
            self.compiling[case.name] = min(seconds, self.compiling.get(case.name, seconds))
            layouts = (json.dumps(instance, ensure_ascii=False, separators=pair) for pair in ((", ", ": "), (",", ":")))
            passing = [self._walk(rival.compile(case.schema), encode(text), words) for text in layouts]
            if any(passing) != is_right:
                # What passes and should not is the worse of the two.
                narrowed = is_right and self.outcomes[case.name] != "loosened"
                self.outcomes[case.name] = "narrowed" if narrowed else "loosened"

    def _walk(self, matcher: Matcher, tokens: list[int], words: np.ndarray) -> bool:
        """Whether a text passes, as a choice would be generated: a mask, then its token."""
        for token in tokens:
            began = time.perf_counter()
            matcher.mask(words)
            self.masks.append(time.perf_counter() - began)
            if not words[0, token // 32] >> token % 32 & 1 or not matcher.accept(token):
                return False
        return matcher.may_end()


def compare(report: Report, model_dir: Path, config: ModelConfig) -> None:
    path = model_dir / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    eos = sorted(config.eos_token_ids)
    words = np.zeros((1, -(-config.vocab_size // 32)), np.int32)
    rivals: list[Rival] = [LLGuidance(path, config.vocab_size, eos)]
    try:
        rivals.append(XGrammar(path, config.vocab_size, eos))
    except ImportError:
        report.conditions["xgrammar"] = "not installed"
    scores = {rival.name: Score() for rival in rivals}
    for case in CASES:
        for rival in rivals:
            scores[rival.name].take(rival, case, lambda text: backend.encode(text).ids, words)
    # Those that every rival takes: refusing is quick.
    taken = [case.name for case in CASES if all(case.name in score.compiling for score in scores.values())]
    for rival in rivals:
        report.conditions[rival.name] = rival.version
        score = scores[rival.name]
        outcomes = Counter(score.outcomes.values())
        for outcome in OUTCOMES:
            report.add(f"{rival.name}: schemas {outcome}", outcomes[outcome], f"of {len(CASES)}")
        compiling = [score.compiling[name] * 1e3 for name in taken]
        for share, name in ((0.5, "median"), (0.95, "p95"), (1.0, "worst")):
            report.add(f"{rival.name}: compile to first mask, {name}", percentile(compiling, share), "ms")
        for share, name in ((0.5, "median"), (0.99, "p99"), (1.0, "worst")):
            report.add(f"{rival.name}: mask, {name}", percentile(score.masks, share) * 1e6, "us")
        report.raw[rival.name] = {"outcomes": score.outcomes, "compile seconds": score.compiling}


def cost(report: Report, model_dir: Path, rounds: int) -> None:
    with Steps(model_dir) as steps:
        report.conditions["steps"] = f"{steps.numerics_id}, 1 thread, context 256, temperature 1, {rounds} rounds"
        for streams in STREAMS:
            turns = steps.turns(streams, rounds)
            name = f"{streams} stream{'s' if streams > 1 else ''}"
            report.add(f"step, {name}: without a grammar", median(turns.free) * 1e3, "ms")
            report.add(f"step, {name}: masks alone, on their thread", median(turns.making) * 1e3, "ms")
            report.add(f"step, {name}: masks ÷ step", turns.making_share, limit=MAX_STEP_SHARE)
            report.add(f"step, {name}: longer with a grammar by", turns.longer, limit=MAX_STEP_SHARE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    report = Report("grammar")
    compare(report, arguments.model_dir, ModelConfig.read(arguments.model_dir))
    cost(report, arguments.model_dir, arguments.rounds)
    print(report.render())
    if XGrammar.name in report.raw:
        print(f"   written to {os.path.relpath(report.write())}")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
