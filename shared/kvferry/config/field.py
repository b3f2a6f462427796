"""What a settings field tells of itself: on the command line, in `--help`, in the documents."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

JOIN_FLAG: Final = "--join"


def flag_name(cls: type[BaseModel], field: str) -> str:
    extra = cls.model_fields[field].json_schema_extra
    if isinstance(extra, dict) and "flag" in extra:
        return str(extra["flag"])
    return "--" + field.replace("_", "-")


def is_secret(field: FieldInfo) -> bool:
    return plain_type(field.annotation) is SecretStr


def is_list(field: FieldInfo) -> bool:
    return typing.get_origin(plain_type(field.annotation)) in (tuple, list, frozenset)


def plain_type(annotation: Any) -> Any:
    """The annotation without `None` and without constraints."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(arm for arm in typing.get_args(annotation) if arm is not types.NoneType)
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def metavar(field: FieldInfo) -> str:
    """What stands for the value in `--help` and in the documents."""
    kind = plain_type(field.annotation)
    if typing.get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (tuple, list, frozenset):
        return "A,B,…"
    return {int: "N", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def shown_default(field: FieldInfo) -> str:
    """The default as a user would write it; empty when there is none to show."""
    default = field.get_default(call_default_factory=False)
    if default is None or isinstance(default, SecretStr):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, (tuple, list, frozenset)):
        return ",".join(str(part) for part in default)
    return str(default)
