"""How `--model` names a model: `DIRECTORY`, or `NAME=DIRECTORY` where requests are to call it NAME."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvferry.errors import SettingError
from kvferry.wire.fields import MAX_NAME_CHARS

MODEL_FLAG: Final = "--model"
NAME_FLAG: Final = "--served-model-name"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`name` is empty where it follows from `where`: a directory, or what else a command finds one by."""

    name: str
    where: str

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """A path that has a `=` in it needs a name before it. Raises `SettingError`."""
        name, named, where = text.partition("=")
        if not named:
            return cls("", text)
        if not where:
            raise SettingError(MODEL_FLAG, f"{text!r} names no directory")
        return cls(checked_name(name.strip(), MODEL_FLAG), where)

    @property
    def served_name(self) -> str:
        """Its name in requests: the directory's own, links resolved, unless another one was given."""
        return self.name or Path(self.where).expanduser().resolve().name

    def __str__(self) -> str:
        return f"{self.name}={self.where}" if self.name else self.where


def model_sources(models: Sequence[str], served_model_name: str) -> tuple[ModelSource, ...]:
    """`served_model_name` is the name of the only model. Raises `SettingError`."""
    sources = tuple(ModelSource.parse(text) for text in models)
    if served_model_name and sources:
        checked_name(served_model_name, NAME_FLAG)
        if len(sources) > 1:
            raise SettingError(
                NAME_FLAG, f"{served_model_name!r} can't name {len(sources)} models; --model NAME=DIRECTORY"
            )
        if sources[0].name not in ("", served_model_name):
            raise SettingError(NAME_FLAG, f"{served_model_name!r}, but --model calls it {sources[0].name!r}")
        return (ModelSource(served_model_name, sources[0].where),)
    return sources


def check_different(names: Iterable[str]) -> None:
    """Raises `SettingError` where two models have one name."""
    known: set[str] = set()
    for name in names:
        if name in known:
            raise SettingError(MODEL_FLAG, f"two models are called {name!r}; write NAME=DIRECTORY")
        known.add(name)


def checked_name(name: str, setting: str) -> str:
    """Raises `SettingError`."""
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise SettingError(setting, f"{name!r} is no name of 1 to {MAX_NAME_CHARS} printable characters")
    return name
