"""Gateways with scripted workers behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_answers import ANSWER
from scripted_worker import Cluster


@pytest.fixture
async def cluster(no_leaks: None, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def serving(cluster: Cluster) -> Cluster:
    """A decode worker that gives the same answer to everything."""
    await cluster.speaker(ANSWER)
    return cluster
