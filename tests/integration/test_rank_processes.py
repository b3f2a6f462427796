"""The ranks of a worker as real processes: one that dies takes the worker down, one that is slow makes it slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import SHAPES, build
from runners import native_library
from stack import eventually

from kvferry.worker.ranks import EXIT_RANK_LOST

# A leader with an event loop, as a worker has it; it runs a step for each line that it reads, on another thread.
LEADER = """
import asyncio, hashlib, sys
import numpy as np
from kvferry.engine.native.runner import NativeRunner
from kvferry.log import setup_logging
from kvferry.runtime import SystemRuntime
from kvferry.schedule.step import SequenceStep, StepPlan
from kvferry.worker.engine import engine_settings
from kvferry.worker.ranks import ranks_of
from kvferry_decode.settings import DecodeSettings

PLAN = StepPlan((SequenceStep(0, np.arange(50, dtype=np.uint32), 0, np.arange(4, dtype=np.int32)),))

async def main():
    settings = DecodeSettings(
        name="d", model=sys.argv[1], dtype="bfloat16", num_blocks=8, tensor_parallel_size=int(sys.argv[2])
    )
    with ranks_of(settings, SystemRuntime()) as ranks:
        runner = NativeRunner(engine_settings(settings), followers=ranks.joined())
        ranks.watch()
        engine, stdin = SystemRuntime().lane("engine"), SystemRuntime().lane("stdin")
        print("ready", flush=True)
        while await stdin.run(sys.stdin.readline):
            (logits,) = await engine.run(runner.logits, PLAN)
            print(hashlib.sha256(logits.tobytes()).hexdigest(), flush=True)
        runner.close()
        engine.close()
        stdin.close()

setup_logging("info", "json", service="d")
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native_library()
    return build(SHAPES[0], tmp_path_factory.mktemp("checkpoint"), dtype=torch.bfloat16)


class Leader:
    def __init__(self, checkpoint: Path, size: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEADER, str(checkpoint), str(size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.line() == "ready", self.process.communicate()[1]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.ranks = [int(pid) for pid in children.split()]
        assert len(self.ranks) == size - 1

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()

    def step(self) -> str:
        """The digest of a step's logits."""
        self.ask()
        return self.line()

    def end(self) -> tuple[int, str]:
        """Its code and what it logged, once it has ended by itself."""
        _, logged = self.process.communicate(timeout=60)
        return self.process.returncode, logged

    def close(self) -> None:
        self.process.kill()
        with self.process:  # closes its pipes
            pass

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def leader(checkpoint: Path) -> Iterator[Leader]:
    leader = Leader(checkpoint, 3)
    yield leader
    leader.close()
    eventually(lambda: not any(map(alive, leader.ranks)))


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_ranks_end_with_their_leader_however_it_ends(checkpoint: Path, leader: Leader) -> None:
    alone = Leader(checkpoint, 1)
    assert leader.step() == alone.step() != ""
    alone.close()
    leader.process.kill()  # the fixture waits for its ranks' end


def test_ranks_end_when_the_worker_stops(leader: Leader) -> None:
    """They ignore what a terminal or an init system sends to all processes at once: the worker drains first."""
    for pid in leader.ranks:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert leader.step() == leader.step()
    code, logged = leader.end()
    assert code == 0, logged
    assert not any(map(alive, leader.ranks))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGABRT, EXIT_RANK_LOST)], ids=["killed", "crashed"]
)
def test_a_rank_that_dies_takes_its_worker_down(leader: Leader, number: signal.Signals, code: int) -> None:
    """At once, in a step that waits for it; as killed from outside if the rank was, else as crashed."""
    leader.step()
    os.kill(leader.ranks[1], signal.SIGSTOP)
    leader.ask()  # the other ranks wait in this step
    os.kill(leader.ranks[0], number)
    ended, logged = leader.end()
    assert ended == code, logged
    assert '"rank": 1' in logged
    assert not alive(leader.ranks[0])


def test_a_slow_rank_makes_the_step_late_and_changes_no_bit(leader: Leader) -> None:
    expected = leader.step()
    os.kill(leader.ranks[0], signal.SIGSTOP)
    leader.ask()
    eventually(lambda: idle(leader.process.pid))  # asleep, not spinning, while it waits
    os.kill(leader.ranks[0], signal.SIGCONT)
    assert leader.line() == expected


def idle(pid: int) -> bool:
    """Whether none of its threads wants a core, now."""
    states = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        states.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return all(state == "S" for state in states)
