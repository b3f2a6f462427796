"""Settings on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic.fields import FieldInfo

from kvferry.config.environment import env_name
from kvferry.config.field import JOIN_FLAG, flag_name, is_list, is_secret, metavar, plain_type, shown_default
from kvferry.config.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


def settings_options(cls: type[Settings]) -> Callable[[F], F]:
    """A click decorator with one flag per field, `--config` included. Values stay text: `load_settings` checks them.

    The command gets `config_file: Path | None` and every field by name, None where no flag was given.
    """

    def decorate(command: F) -> F:
        for field, spec in reversed(cls.model_fields.items()):
            if not is_secret(spec):
                command = _option(flag_name(cls, field), field, spec)(command)
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            help="YAML file of settings, by their names with underscores.",
        )(command)

    return decorate


def _option(flag: str, field: str, spec: FieldInfo) -> Callable[[F], F]:
    shown = shown_default(spec)
    text = f"{spec.description}  [{f'default: {shown}; ' if shown else ''}env: {env_name(field)}]"
    if flag == JOIN_FLAG:
        # The value is optional: alone it means the run file that `kvferry up` writes by default.
        return click.option(flag, field, is_flag=False, flag_value="", default=None, metavar="[RUNFILE]", help=text)
    if plain_type(spec.annotation) is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field, default=None, help=text)
    several = is_list(spec)
    return click.option(flag, field, type=str, default=None, multiple=several, metavar=metavar(spec), help=text)
