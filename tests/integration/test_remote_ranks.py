"""Ranks of one worker in two networks: what they compute and hand over is what ranks on one host do, to the bit."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SHAPES, build
from namespaces import HOSTS, two_networks
from pages import parts, put, written
from ranked import ranked
from stack import KVFERRY

from kvferry.bus.server import find_nats_server
from kvferry.engine.ranks.followers import Exchange, Setup
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.errors import CheckpointError
from kvferry.schedule.step import BlockTable, SequenceStep, StepPlan
from kvferry.wire.frame import Piece
from kvferry.worker.rank_port import RankLink
from kvferry.worker.ranks import EXIT_RANK_LOST
from kvferry.worker.remote_rank import load
from kvferry.worker.settings import RankSettings

ROOT = Path(__file__).parents[2]
KEY = "5a" * 32
PORT = 7777
SIZE = 4
NUM_BLOCKS = 12
TABLE, OTHER, BESIDE = (np.asarray(blocks, np.int32) for blocks in ((0, 1, 2, 3), (7, 5, 4, 6), (8, 9, 10, 11)))

# A leader as a worker has it. For each line that it reads it runs a step and tells digests.
LEADER = """
import asyncio, sys
sys.path[:0] = sys.argv[4:]
from test_remote_ranks import BESIDE, KEY, NUM_BLOCKS, PORT, SIZE, digest, handed_over, pieces, plan
from kvferry.engine.torch.runner import TorchRunner
from kvferry.log import setup_logging
from kvferry.runtime import SystemRuntime
from kvferry.worker.engine import engine_settings
from kvferry.worker.ranks import ranks_of
from kvferry_decode.settings import DecodeSettings

async def main():
    settings = DecodeSettings(
        name="d", model=sys.argv[1], num_blocks=NUM_BLOCKS, tensor_parallel_size=SIZE, remote_ranks=int(sys.argv[2]),
        host=sys.argv[3], rank_port=PORT, data_key=KEY,
    )
    runtime = SystemRuntime()
    with ranks_of(settings, runtime) as ranks:
        engine, copies, stdin = (runtime.lane(name) for name in ("engine", "copies", "stdin"))
        runner = await engine.run(lambda: TorchRunner(engine_settings(settings), followers=ranks.joined()))
        ranks.watch()
        print("ready", flush=True)
        while await stdin.run(sys.stdin.readline):
            found = await engine.run(runner.logits, plan())
            for piece in pieces(runner):
                step = engine.run(runner.logits, plan(BESIDE))  # frames are copied beside steps
                found += await copies.run(handed_over, runner, piece)
                await step
            print(*map(digest, found), flush=True)

setup_logging("info", "json", service="d")
asyncio.run(main())
"""


def plan(table: BlockTable = TABLE) -> StepPlan:
    return StepPlan((SequenceStep(0, np.arange(50, dtype=np.uint32), 0, table),))


def pieces(runner: TorchRunner) -> list[Piece]:
    """All heads, and all but the first."""
    kv = runner.kv_format
    return [Piece(0, kv.num_layers, 3, 50, first, kv.num_kv_heads) for first in (0, 1)]


def handed_over(runner: TorchRunner, piece: Piece) -> list[bytearray]:
    """A frame of the KV, and the same once more from where it was scattered to."""
    out, again = (bytearray(piece.num_bytes(runner.kv_format.head_dim, runner.kv_format.dtype)) for _ in range(2))
    runner.gather(piece, TABLE, memoryview(out))
    runner.scatter(piece, OTHER, memoryview(out))
    runner.gather(piece, OTHER, memoryview(again))
    return [out, again]


def digest(content: np.ndarray | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SHAPES[0], tmp_path_factory.mktemp("checkpoint"))


class Process:
    def __init__(self, host: Sequence[str], *command: str, environ: Mapping[str, str] | None = None) -> None:
        own = {"KVFERRY_DATA_KEY": KEY, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*host, sys.executable, *command], env={**os.environ, **own, **(environ or {})}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()

    def logged(self, event: str) -> None:
        """Returns once it has logged it."""
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if f'"event": "{event}"' in line:
                return
        raise AssertionError("".join(lines))

    def end(self) -> tuple[int, str]:
        """Its code and what it logged, once it has ended by itself."""
        _, logged = self.process.communicate(timeout=60)
        return self.process.returncode, logged


@contextmanager
def running(host: Sequence[str], *command: str, environ: Mapping[str, str] | None = None) -> Iterator[Process]:
    process = Process(host, *command, environ=environ)
    try:
        yield process
    finally:
        process.process.kill()
        with process.process:  # closes its pipes
            pass


def test_ranks_in_another_network_compute_and_hand_over_the_same_bits_and_all_end_with_one(checkpoint: Path) -> None:
    """One of four ranks is beside the leader, two are elsewhere. One of these is killed in a step: the others end."""
    settings = EngineSettings(checkpoint, num_blocks=NUM_BLOCKS, threads=1)
    with ranked("torch", settings, SIZE) as alone:
        assert isinstance(alone, TorchRunner)
        found = [*alone.logits(plan()), *(each for piece in pieces(alone) for each in handed_over(alone, piece))]
    assert found[1] == found[2] != bytes(len(found[1]))
    with ExitStack() as stack:
        here, there = stack.enter_context(two_networks(ROOT))
        join = ("-m", "kvferry.worker.remote_rank", "--leader", f"{HOSTS[0]}:{PORT}")
        remote = [stack.enter_context(running(there, *join)) for _ in range(2)]
        folders = (str(ROOT / "tests"), str(Path(__file__).parent))
        leader = stack.enter_context(running(here, "-c", LEADER, str(checkpoint), "2", HOSTS[0], *folders))
        assert leader.line() == "ready", leader.end()
        for _ in range(2):
            leader.ask()
            assert leader.line().split() == [digest(content) for content in found]
        remote[0].process.send_signal(signal.SIGSTOP)
        leader.ask()
        remote[0].process.kill()
        code, logged = leader.end()
        assert code == EXIT_RANK_LOST, logged
        assert '"event": "a rank has ended: exiting"' in logged
        remote[1].end()


def test_the_pages_two_commands_are_one_worker_on_two_machines(checkpoint: Path, tmp_path: Path) -> None:
    """A decode worker that serves, on a NATS server of its network, and a rank elsewhere that ends with it."""
    decode, rank = written("docs/tuning.md", "test_the_pages_two_commands_are_one_worker_on_two_machines")
    copy = shutil.copytree(checkpoint, tmp_path / "qwen")  # the other machine's
    config = tmp_path / "nats.conf"
    leading = parts(put(decode, {"10.0.0.1": HOSTS[0]}))[1]
    following = parts(put(rank, {"10.0.0.1": HOSTS[0], "/models/qwen": copy}))[1]
    assert [leading[:2], following[:2]] == [["kvferry", "decode"], ["kvferry", "rank"]]
    told = {"KVFERRY_MODEL": str(checkpoint), "KVFERRY_NATS_URL": f"nats://{HOSTS[0]}:4222", "KVFERRY_NUM_BLOCKS": "12"}
    with ExitStack() as stack:
        here, there = stack.enter_context(two_networks(ROOT))
        config.write_text(f'listen: "{HOSTS[0]}:4222"\nmax_payload: 8MB\n')
        server = [*here, find_nats_server(), "--config", str(config)]
        nats = stack.enter_context(subprocess.Popen(server, stderr=subprocess.PIPE, text=True))
        stack.callback(nats.kill)
        assert nats.stderr is not None
        assert any("Server is ready" in line for line in nats.stderr)
        leader = stack.enter_context(running(here, KVFERRY, *leading[1:], environ=told))
        follower = stack.enter_context(running(there, KVFERRY, *following[1:]))
        leader.logged("serving")
        follower.logged("joined")
        leader.process.send_signal(signal.SIGTERM)
        assert leader.end()[0] == 0
        assert follower.end()[0] == 0


def test_a_rank_that_has_another_model_than_its_leader_says_so(checkpoint: Path) -> None:
    settings = EngineSettings(checkpoint, num_blocks=4, tensor_parallel_size=2, remote_ranks=1).as_fields()
    setup = Setup("torch", 1, settings, Exchange(HOSTS[0], 1), format_id="of the leader", part_id="of the leader")
    nowhere = RankLink.__new__(RankLink)  # it is not asked for
    with pytest.raises(CheckpointError, match="is not the leader's model"):
        load(setup, nowhere, RankSettings())
    with pytest.raises(CheckpointError, match="nowhere"):
        load(setup, nowhere, RankSettings(model_dir="/nowhere"))
