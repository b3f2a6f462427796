"""What an answer consists of. Texts of one kind that follow each other are one text in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; calls of an answer are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments: JSON text as the model wrote it."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


@dataclass(slots=True)
class Call:
    """A tool call, as far as it has come."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """All parts of an answer, put together."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Message:
        message = cls()
        texts: list[str] = []
        thoughts: list[str] = []
        arguments: list[list[str]] = []
        for part in parts:
            match part:
                case Content(text):
                    texts.append(text)
                case Reasoning(text):
                    thoughts.append(text)
                case CallStart(_, name):
                    message.calls.append(Call(name))
                    arguments.append([])
                case CallArguments(index, text):
                    arguments[index].append(text)
        message.content, message.reasoning = "".join(texts), "".join(thoughts)
        for call, pieces in zip(message.calls, arguments, strict=True):
            call.arguments = "".join(pieces)
        return message
