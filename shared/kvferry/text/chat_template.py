"""Chat templates: Jinja programs that come with a model and turn a conversation into its prompt.

A template is code from elsewhere, so it runs in Jinja's immutable sandbox, sees nothing but the
conversation, and writes a bounded amount. The environment is the one that templates are written for (that
of transformers): trimmed blocks, loop controls, a plain `tojson`, `raise_exception`, `strftime_now`, and
the `generation` tag, which marks the assistant's part for training and changes no text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvferry import runtime
from kvferry.errors import CheckpointError
from kvferry.text.errors import ChatTemplateError
from kvferry.text.model_dir import MAX_TEMPLATE_BYTES, ModelDir

MAX_RENDERED_CHARS: Final = 16 << 20  # of one rendered conversation


class ChatTemplate:
    """One model's template, compiled once. Rendering keeps no state, so threads may share it."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        origin: str = "chat template",
        wall_clock: Callable[[], float] = runtime.wall_clock,
    ) -> None:
        """`special_tokens`: `bos_token` and so on, by name. `origin` names the source in errors.

        `wall_clock` gives Unix seconds for templates that print the date. Raises `CheckpointError` for a
        template that is too large or does not compile.
        """
        if len(source) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(origin, f"chat_template: larger than {MAX_TEMPLATE_BYTES} bytes")
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.fromtimestamp(wall_clock()).strftime(format)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise CheckpointError(origin, f"chat_template: {error}") from error
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def of(cls, model: ModelDir, *, wall_clock: Callable[[], float] = runtime.wall_clock) -> ChatTemplate | None:
        """The template of a model directory; None for a base model, which has none."""
        if model.chat_template is None:
            return None
        return cls(model.chat_template, model.special_tokens, origin=str(model.path), wall_clock=wall_clock)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt of a conversation, to be encoded without further special tokens.

        Fields of a message that are None are left out, as templates test with `is defined`. `extra` are
        further template variables (`tools`, `enable_thinking`, …). Raises `ChatTemplateError`.
        """
        conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {"tools": None, "documents": None, **self._special_tokens, **extra}
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                **variables, messages=conversation, add_generation_prompt=add_generation_prompt
            ):
                length += len(part)
                if length > MAX_RENDERED_CHARS:
                    raise ChatTemplateError(f"writes more than {MAX_RENDERED_CHARS} characters")
                parts.append(part)
        except ChatTemplateError:
            raise
        except jinja2.TemplateError as error:
            raise ChatTemplateError(error.message or type(error).__name__) from error
        except Exception as error:  # a template is a program: it fails in as many ways as one
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own gives an undefined value for a forbidden attribute, which prints as nothing. This one stops."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is not accessible")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: the body, in a scope of its own."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - the type that Jinja declares

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which would reach the model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))
