"""Fixtures and rules for all tests.

- `no_leaks`: the test leaves nothing behind (`leaks.py`); for a file:
  `pytestmark = pytest.mark.usefixtures("no_leaks")`.
- `nats`: a real nats-server of the test's own.
- `model_dir`: the real default model, from KVFERRY_TEST_MODEL (`make test` sets it).
- `setup_logging` configures a whole process: after each test it is undone.
- With several processes (`--dist loadgroup`), the tests of a file share one, with its fixtures.
- Property tests have no deadline for an example; pytest's timeout ends a hang.
- With KVFERRY_ALLOWED_SKIPS (CI sets it) a skip that the named list does not allow fails the run.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings
from leaks import Holdings, leaks_since
from nats_server import NatsServer, running_nats

pytest_plugins = ("pytester",)  # the rules below are tested, too

# How long an example takes depends on who else uses the machine: no reason to fail.
settings.register_profile(
    "shared machine", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared machine")

TEST_MODEL = "KVFERRY_TEST_MODEL"
ALLOWED_SKIPS = "KVFERRY_ALLOWED_SKIPS"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.fixture
async def no_leaks() -> AsyncIterator[None]:
    before = Holdings.now()
    yield
    left = await leaks_since(before)
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture
async def nats() -> AsyncIterator[NatsServer]:
    async with running_nats() as server:
        yield server


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face form."""
    if not (path := os.environ.get(TEST_MODEL)):
        pytest.skip(f"{TEST_MODEL} is not set; `make test` sets it")
    return Path(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests, a file's go to one of them, unless it names groups of its own."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if unexpected := _unexpected_skips(terminalreporter):
        terminalreporter.section("skipped without leave", red=True)
        for line in unexpected:
            terminalreporter.line(line)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.exitstatus == pytest.ExitCode.OK and _unexpected_skips(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexpected_skips(reporter: pytest.TerminalReporter) -> list[str]:
    if not (path := os.environ.get(ALLOWED_SKIPS)):
        return []
    lines = [line.split("#")[0].split() for line in Path(path).read_text().splitlines()]
    patterns = [line[0] for line in lines if line]
    skipped = [report.nodeid for report in reporter.stats.get("skipped", [])]
    return [nodeid for nodeid in skipped if not any(fnmatch.fnmatch(nodeid, pattern) for pattern in patterns)]
