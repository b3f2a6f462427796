"""Errors of the text layer.

KvferryError
├── CheckpointError       (kvferry.errors) a model's files cannot be used; names the file
├── ChatTemplateError     a conversation that the model's chat template does not take
├── InvalidTextError      a string that is not text: a lone surrogate
└── ModelFetchError       a known model could not be brought onto this machine
"""

from __future__ import annotations

from kvferry.errors import KvferryError


class ChatTemplateError(KvferryError):
    """A conversation that the template does not take.

    `reason` is the template's own message when it refused (`raise_exception`), else what went wrong in it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"chat template: {reason}")
        self.reason = reason


class InvalidTextError(KvferryError):
    """A string with a lone surrogate, which no UTF-8 text can hold. `position` counts characters."""

    def __init__(self, position: int) -> None:
        super().__init__(f"character {position} is a lone surrogate")
        self.position = position


class ModelFetchError(KvferryError):
    """A model is unknown, or could not be downloaded or stored. `model` is its name as the user wrote it."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"model {model}: {problem}")
        self.model = model
        self.problem = problem
