"""Bugs that the simulation must find: each is planted into a copy of the sources, never into the product.

A plant replaces text that must stand in its file exactly once: one that no longer applies is an error. The search
takes seed after seed and writes the first that fails into `plants_found.json`, which the tests replay.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = Path(__file__).with_name("plants_found.json")
MAX_SEEDS = 500
SOURCES = ("shared", "services/gateway", "services/prefill", "services/decode", "services/local")
TIMEOUT_S = 3600.0


class PlantDoesNotApply(AssertionError):
    """The text that a plant replaces is not there."""


@dataclass(frozen=True)
class Edit:
    """In one file: `old`, which stands there once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Plant:
    name: str
    edits: tuple[Edit, ...]


_FENCES = "shared/kvferry/worker/fences.py"
_INBOX = "shared/kvferry/worker/inbox.py"

PLANTS: tuple[Plant, ...] = (
    Plant(
        "fencing by attempt dropped",
        (
            Edit(_FENCES, "if work.attempt <= self._fenced.get(work.gateway_incarnation, -1):", "if False:"),
            Edit(_FENCES, "if newest is not None and newest[1] > work.attempt:", "if False:"),
            Edit(
                _INBOX,
                "self._give_up(work for work in self._works_of(gateway) if work.attempt <= highest)",
                "pass",
            ),
        ),
    ),
    Plant(
        "frame checksum not checked",
        (
            Edit(
                "shared/kvferry/wire/frame.py",
                "if _SUM.unpack_from(slot, _SUM_OFFSET)[0] != _checksum(slot, received):",
                "if False:",
            ),
        ),
    ),
    Plant(
        "manifest not checked",
        (
            Edit(
                "shared/kvferry/worker/handoff/incoming.py",
                "if manifest.kv_format_id != kv_format_id:",
                "return None\n        if manifest.kv_format_id != kv_format_id:",
            ),
        ),
    ),
    Plant(
        "a staging slot reused before its completion",
        (
            Edit(
                "shared/kvferry/transport/slots.py",
                "if slot.transfer is not None and slot.transfer.done():",
                "if slot.transfer is not None:",
            ),
        ),
    ),
    Plant(
        "a dead gateway's requests not cancelled",
        (Edit(_INBOX, "            for work in works:\n                worker.cancel(work.key)\n", ""),),
    ),
    Plant(
        "token de-duplication off",
        (
            Edit(
                "services/gateway/kvferry_gateway/streams/stream.py",
                "        if index < len(tokens):\n            return tokens[index] == token\n",
                "        if index < len(tokens):\n            self.append(token)\n            return True\n",
            ),
        ),
    ),
    Plant(
        "hold-and-wait brought back",
        (
            Edit(
                "services/decode/kvferry_decode/worker.py",
                "            self._puller.open(sequence, address, parts)\n",
                "            self._puller.open(sequence, address, parts)\n"
                "            self.scheduler.due(sequence.key)\n",
            ),
        ),
    ),
    Plant(
        "token 0 sampled again by a recompute",
        (
            Edit(
                "services/gateway/kvferry_gateway/flights/offer.py",
                "generated=pack_tokens(stream.tokens),",
                "generated=pack_tokens(stream.tokens if len(stream.tokens) > 1 else []),",
            ),
        ),
    ),
    Plant(
        "a lost last batch not repaired",
        (
            Edit(
                "services/gateway/kvferry_gateway/streams/attempt.py",
                "if attempt.promised.get(incarnation, 0) > held:",
                "if False:",
            ),
            Edit(
                "shared/kvferry/worker/outbox.py",
                "if stream.end is not None and now >= stream.repeat_at:",
                "if False:",
            ),
        ),
    ),
    Plant(
        # In the simulation the world starts a worker's process, as `kvferry.worker.service` does elsewhere.
        "a restarted worker keeping its old incarnation",
        (
            Edit(
                "tests/cluster.py",
                "incarnation = self.runtime.random_u64()",
                'incarnation = int.from_bytes(settings.name.encode()[-8:], "little")',
            ),
        ),
    ),
)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of what the simulation imports."""
    with tempfile.TemporaryDirectory(prefix="kvferry-planted-") as directory:
        root = Path(directory)
        ignore = shutil.ignore_patterns("__pycache__", "*.so", ".*")
        for source in SOURCES:
            shutil.copytree(ROOT / source, root / source, ignore=ignore)
        (root / "tests").mkdir()
        for file in (ROOT / "tests").glob("*.py"):
            shutil.copy(file, root / "tests")
        shutil.copytree(ROOT / "tests/simulation", root / "tests/simulation", ignore=ignore)
        yield root


@contextmanager
def planted(plant: Plant, root: Path) -> Iterator[None]:
    """The tree with the bug in it. Raises `PlantDoesNotApply`."""
    before: dict[Path, str] = {}
    try:
        for edit in plant.edits:
            path = root / edit.file
            text = path.read_text()
            if text.count(edit.old) != 1:
                raise PlantDoesNotApply(
                    f"{plant.name}: {edit.old!r} stands {text.count(edit.old)} times in {edit.file}"
                )
            before.setdefault(path, text)
            path.write_text(text.replace(edit.old, edit.new))
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


def simulation(
    root: Path, *arguments: str, timeout: float = TIMEOUT_S, hash_seed: str = "0"
) -> subprocess.CompletedProcess[str]:
    """The simulation's program over a copied tree."""
    path = os.pathsep.join(str(root / source) for source in SOURCES)
    # Bytecode is looked up by time and size of a file, which an edit may leave as they are.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, str(root / "tests/simulation"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def search(num_processes: int) -> int:
    """Look for the first seed that catches each plant. Returns how many stay unfound."""
    found: dict[str, int] = {}
    with copied_tree() as root:
        for plant in PLANTS:
            began = time.monotonic()
            with planted(plant, root):
                run = simulation(
                    root, "sweep", "--seeds", str(MAX_SEEDS), "--processes", str(num_processes), "--first-failure"
                )
            lines = [line for line in run.stdout.splitlines() if line.startswith("seed ")]
            seconds = time.monotonic() - began
            if not lines:
                print(f"{plant.name}: NOT found in {MAX_SEEDS} seeds, {seconds:.0f} s {run.stderr[-500:]}", flush=True)
                continue
            found[plant.name] = seed = int(lines[0].split()[1].rstrip(":"))
            print(f"{plant.name}: after {seed + 1} seeds, {seconds:.0f} s: {lines[0][:160]}", flush=True)
    FOUND.write_text(json.dumps(found, indent=2) + "\n")
    return len(PLANTS) - len(found)
