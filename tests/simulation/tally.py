"""What seeds came to, all together; kept in a file, a sweep that was cut short goes on where it was."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path

import msgspec
from seed import Story

ROOT = Path(__file__).parents[2]
# What a seed runs, pytest's files among them aside: nothing else can change what it comes to.
SOURCES = ("shared/**/*.py", "services/**/*.py", "tests/*.py", "tests/simulation/*.py")
PYTESTS = ("conftest.py", "test_")


class Tally(msgspec.Struct, kw_only=True):
    """Of `num_seeds` seeds from `first` on."""

    first: int
    sources: str = ""  # which sources and Python they ran on, where that is kept
    num_seeds: int = 0
    failed: list[int] = []  # msgspec copies it
    digest: str = ""  # over the seeds' digests, in their order
    num_pieces: int = 1  # how many sweeps it took
    seconds: float = 0.0
    cpu_s: float = 0.0
    most_cpu_s: float = 0.0
    num_requests: int = 0
    num_steps: int = 0
    poor: list[int] = []  # seeds with less than a seed must have
    hits: dict[str, int] = {}

    def add(self, seed: int, story: Story | None) -> None:
        """The next seed; it failed if it has no story."""
        self.num_seeds += 1
        if story is None:
            self.failed.append(seed)
            return
        self.digest = hashlib.sha256((self.digest + story.digest).encode()).hexdigest()[:32]
        self.cpu_s += story.cpu_s
        self.most_cpu_s = max(self.most_cpu_s, story.cpu_s)
        self.num_requests += story.num_requests
        self.num_steps += story.num_steps
        if not story.is_rich:
            self.poor.append(seed)
        self.hits = dict(sorted((Counter(self.hits) + Counter(story.hits)).items()))

    def __str__(self) -> str:
        pieces = "" if self.num_pieces == 1 else f", in {self.num_pieces} pieces"
        return (
            f"{self.num_seeds} seeds from {self.first} on in {self.seconds:.0f} s{pieces} "
            f"({self.num_seeds / max(self.seconds, 1e-9):.2f} seeds/s): {len(self.failed)} violations "
            f"{self.failed or ''}\n{self.num_requests} requests, {self.num_steps} engine steps, "
            f"{sum(self.hits.values())} faults that hit a live request, "
            f"{len(self.poor)} seeds with less than a seed must have {self.poor or ''}; CPU per seed: mean "
            f"{self.cpu_s / max(1, self.num_seeds - len(self.failed)):.2f} s, most {self.most_cpu_s:.2f} s\n"
            + ", ".join(f"{kind} {number}" for kind, number in self.hits.items())
        )

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        partial.replace(path)


def begin(first: int, path: Path | None = None) -> Tally:
    """An empty tally; or what `path` has, if it is of these seeds on these very sources."""
    if path is None:
        return Tally(first=first)
    sources = sources_digest()
    if path.exists():
        kept = msgspec.json.decode(path.read_bytes(), type=Tally)
        if (kept.sources, kept.first) == (sources, first):
            kept.num_pieces += 1
            return kept
    return Tally(first=first, sources=sources)


def sources_digest() -> str:
    digest = hashlib.sha256(f"python {sys.version_info.major}.{sys.version_info.minor}".encode())
    for file in sorted({file for pattern in SOURCES for file in ROOT.glob(pattern)}):
        if file.name.startswith(PYTESTS):
            continue
        digest.update(f"\n{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:32]
