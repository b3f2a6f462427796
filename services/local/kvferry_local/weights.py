"""Finding, fetching and importing models for the command line, with progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from kvferry.errors import SettingError
from kvferry.model_source import ModelSource, check_different, model_sources
from kvferry.text.errors import ModelFetchError
from kvferry.text.fetch import KNOWN_MODELS, cached_model, fetch_model, resolve_model
from kvferry.text.gguf_import import Progress as OnProgress
from kvferry.text.gguf_import import import_gguf
from kvferry.text.model_dir import ModelDir

PLAIN_STEP: Final = 25  # percent between two lines where nobody watches a bar


def resolve(models: Sequence[str], served_model_name: str) -> tuple[ModelSource, ...]:
    """Each model's directory, fetched if need be, with the name to serve it under. Raises as `resolve_one` does."""
    found = []
    for source in model_sources(models, served_model_name):
        directory, name = resolve_one(source.where)
        found.append(ModelSource(source.name or name, str(directory)))
    check_different(source.name for source in found)
    return tuple(found)


def resolve_one(model: str) -> tuple[Path, str]:
    """A model's directory, fetched if need be, and its own name.

    Raises `SettingError` for what is no model, `CheckpointError` for a directory that is none inside,
    `ModelFetchError` for a known model that cannot be fetched.
    """
    if model in KNOWN_MODELS:
        return fetch(model), model
    with no_progress() as on_progress:
        try:
            directory = resolve_model(model, on_progress)
        except ModelFetchError as error:
            raise SettingError("--model", f"{error.model}: {error.problem}") from None
    return directory.resolve(), ModelDir(directory).name


def fetch(name: str) -> Path:
    """A known model's directory. Raises `ModelFetchError`."""
    with shown_progress(name) as on_progress:
        return fetch_model(name, progress=on_progress)


def import_file(gguf: Path, directory: Path) -> None:
    """Raises `CheckpointError`."""
    with shown_progress(gguf.name) as on_progress:
        import_gguf(gguf, directory, on_progress)


def known() -> list[tuple[str, Path | None]]:
    """Names that `fetch` takes, and where they lie if they have been fetched."""
    return [(name, cached_model(name)) for name in KNOWN_MODELS]


@contextlib.contextmanager
def no_progress() -> Iterator[OnProgress]:
    yield lambda stage, done, total: None


@contextlib.contextmanager
def shown_progress(title: str) -> Iterator[OnProgress]:
    """On stderr: a bar on a terminal, else a line for every quarter."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield PlainProgress(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{title}: {stage}")
            bars.update(tasks[stage], completed=done, total=total)

        yield draw


class PlainProgress:
    """Progress as lines."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown: tuple[str, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1) // PLAIN_STEP * PLAIN_STEP
        if self._shown != (stage, percent):
            self._shown = (stage, percent)
            sys.stderr.write(f"{self._title}: {stage} {percent} %\n")
