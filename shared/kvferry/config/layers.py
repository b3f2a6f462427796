"""From layers to settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from kvferry.config.environment import FILE_SUFFIX, env_name
from kvferry.config.field import flag_name, is_list, is_secret
from kvferry.config.settings import Layer, Settings
from kvferry.errors import SettingError
from kvferry.runfile import RunFile
from kvferry.secret_file import read_secret
from kvferry.yaml_file import read_mapping

S = TypeVar("S", bound="Settings")


def load_settings(
    cls: type[S],
    *,
    config_file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    run_file: RunFile | None = None,
) -> S:
    """Merge the layers, validate, freeze. `flags` holds only what was given. Raises `SettingError`."""
    layers: list[Layer] = [
        (_from_run_file(cls, run_file), lambda field: f"run file's {field}"),
        (_from_yaml(cls, config_file), lambda field: f"{field} in {config_file}"),
        _from_standard_variables(cls, environ),
        (
            {field: environ[env_name(field)] for field in cls.model_fields if env_name(field) in environ},
            env_name,
        ),
        (_from_secret_files(cls, environ), lambda field: env_name(field) + FILE_SUFFIX),
        (
            {field: _joined(value) for field, value in flags.items() if value is not None and value != ()},
            lambda field: flag_name(cls, field),
        ),
    ]
    scaling_file = next((layer["scaling_file"] for layer, _ in reversed(layers) if layer.get("scaling_file")), None)
    layers.insert(0, cls.scaling_layer(Path(str(scaling_file)) if scaling_file else None))
    values: dict[str, object] = {}
    written: dict[str, str] = {}  # field -> its name as the user wrote it
    for layer, spell in layers:
        for field, value in layer.items():
            values[field] = _listed(cls.model_fields[field], value)
            written[field] = spell(field)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise _named(cls, error, values, written) from None


def _from_run_file(cls: type[Settings], run_file: RunFile | None) -> dict[str, object]:
    if run_file is None:
        return {}
    run_file = run_file.in_role(cls.role)
    facts = {field: getattr(run_file, field) for field in RunFile.model_fields}
    if "model" in cls.model_fields and not is_list(cls.model_fields["model"]):
        # Of several a worker must be told its own.
        facts["model"] = run_file.model[0] if len(run_file.model) == 1 else ""
    return {field: value for field, value in facts.items() if field in cls.model_fields and value}


def _from_standard_variables(cls: type[Settings], environ: Mapping[str, str]) -> Layer:
    """What variables say that other programs know, too."""
    variables = {
        field: str(extra["variable"])
        for field, spec in cls.model_fields.items()
        if isinstance(extra := spec.json_schema_extra, dict) and "variable" in extra
    }
    given = {field: environ[name] for field, name in variables.items() if environ.get(name)}
    return given, variables.__getitem__


def _from_secret_files(cls: type[Settings], environ: Mapping[str, str]) -> dict[str, object]:
    """Secrets, from the files that the environment names."""
    secrets: dict[str, object] = {}
    for field, spec in cls.model_fields.items():
        name = env_name(field) + FILE_SUFFIX
        if not is_secret(spec) or not environ.get(name):
            continue
        if environ.get(env_name(field)):
            raise SettingError(name, f"is set beside {env_name(field)}; give one of them")
        secrets[field] = read_secret(Path(environ[name]), name)
    return secrets


def _from_yaml(cls: type[Settings], path: Path | None) -> dict[str, object]:
    if path is None:
        return {}
    document = read_mapping(path, "--config")
    for key in document:
        if key not in cls.model_fields:
            raise SettingError(f"{key} in {path}", f"unknown setting of the {cls.role}")
    # `port:` with nothing behind it leaves the setting at its default, as YAML users expect.
    return {key: value for key, value in document.items() if value is not None}


def _listed(field: FieldInfo, value: object) -> object:
    """Flags and variables write a list with commas; a flag may stand there several times, too."""
    if isinstance(value, str) and is_list(field):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _joined(value: object) -> object:
    """A flag of a list may be given again and again."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _named(
    cls: type[Settings], error: ValidationError, values: Mapping[str, object], written: Mapping[str, str]
) -> SettingError:
    first = error.errors(include_url=False, include_context=False)[0]
    # A validator of the whole object has no field; its message names what it compares.
    if not first["loc"]:
        return SettingError(cls.role, first["msg"].removeprefix("Value error, "))
    field = str(first["loc"][0])
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    if field in values and not is_secret(cls.model_fields[field]):
        problem += f", not {values[field]!r}"
    return SettingError(written.get(field, flag_name(cls, field)), problem)
