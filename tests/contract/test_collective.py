"""What every collective of the torch engine's ranks must do, each rank on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runners import native_library
from torch.distributed import FileStore

from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.torch import collective
from kvferry.engine.torch.collective import Collective, NetworkGather, SharedGather, joined_exchange, open_exchange

SIZE = 3
WIDTHS = (5, 1, 8)
Make = Callable[[int], Collective]


@pytest.fixture(params=["shared memory", "gloo", "gloo over the network"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    if request.param == "gloo":
        path = str(tmp_path / "store")
        yield lambda rank: NetworkGather(lambda: FileStore(path, SIZE), "127.0.0.1", rank, SIZE)
        return
    if request.param == "gloo over the network":
        exchange, store = open_exchange("127.0.0.1")
        leader = NetworkGather(lambda: store, "127.0.0.1", 0, SIZE)
        yield lambda rank: joined_exchange(exchange, "127.0.0.1", rank, SIZE) if rank else leader
        return
    library, memory = native_library(), SharedMemory.create(SIZE)
    yield lambda rank: SharedGather(library, memory.exchange(SharedGather.num_bytes), rank, SIZE)
    memory.close()


def parts(num_rows: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rows, width, generator=generator).to(dtype) for width in WIDTHS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_rank_gets_all_columns_in_the_order_of_ranks(make: Make, dtype: torch.dtype) -> None:
    """Many times, of changing numbers of rows, none among them: no rank overtakes another."""
    rounds = [parts(rows, dtype, seed) for seed, rows in enumerate((1, 7, 0, 64, 2, 1, 1) * 8)]

    def run(rank: int) -> list[torch.Tensor]:
        own = make(rank)
        return [own.gather(each[rank], WIDTHS) for each in rounds]

    with ThreadPoolExecutor(SIZE) as pool:
        for found in pool.map(run, range(SIZE)):
            for whole, each in zip(found, rounds, strict=True):
                assert torch.equal(whole, torch.cat(each, 1))
                assert whole.dtype == dtype


def test_rows_beyond_the_shared_buffer_go_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "BUFFER_BYTES", 3 * sum(WIDTHS) * 4)  # three rows
    library, memory, content = native_library(), SharedMemory.create(SIZE), parts(11, torch.float32, 0)

    def run(rank: int) -> torch.Tensor:
        return SharedGather(library, memory.exchange(SharedGather.num_bytes), rank, SIZE).gather(content[rank], WIDTHS)

    with ThreadPoolExecutor(SIZE) as pool:
        assert all(torch.equal(whole, torch.cat(content, 1)) for whole in pool.map(run, range(SIZE)))
    memory.close()
