"""Settings: one frozen object per service, filled from layers.

    defaults  <  scaling.yaml  <  run file  <  YAML file  <  environment (KVFERRY_<FIELD>)  <  flags (--field)

A field is written once, in its settings class: its description is the flag's `--help` text and its row in
the documents' table, its type and bounds are what every layer is checked against. A wrong value raises
`SettingError` with the setting's name as the user wrote it: flag, variable or YAML key.

Secrets (`SecretStr`) have no flag, because a command line is visible to every user of the machine. KVFERRY_<FIELD>_FILE
names a file that holds one, as containers mount them.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import click
from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kvferry.errors import SettingError
from kvferry.runfile import RunFile
from kvferry.scaling import SERVICES, scaling_path
from kvferry.yaml_file import read_mapping

ENV_PREFIX: Final = "KVFERRY_"
FILE_SUFFIX: Final = "_FILE"
DATA_KEY_BYTES: Final = 32
MAX_SECRET_CHARS: Final = 4096
_SECRET_NAME: Final = re.compile(rf"{ENV_PREFIX}\w+_(PASSWORD|TOKEN|KEY)({FILE_SUFFIX})?")
JOIN_FLAG: Final = "--join"
# What tells one process from another has no place in a file that all replicas share.
NOT_OF_SCALE: Final = frozenset({"name", "cluster", "run_file", "scaling_file"})

SubjectName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Port = Annotated[int, Field(ge=0, le=65535)]
OtlpEndpoint = Annotated[str, StringConstraints(pattern=r"^(https?://\S+)?$")]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

Layer = tuple[Mapping[str, object], Callable[[str], str]]  # values, and how the user wrote a field's name

S = TypeVar("S", bound="Settings")
F = TypeVar("F", bound=Callable[..., Any])


class Settings(BaseModel):
    """Base of every settings object. `role` names its command and its section in the documents."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    role: ClassVar[str]

    @classmethod
    def scaling_layer(cls, path: Path | None) -> Layer:
        """What `scaling.yaml` says: `path` if one was named. Raises `SettingError`."""
        return {}, str


class ServiceSettings(Settings):
    """What every service needs. Services subclass it and set `role`."""

    role: ClassVar[str] = "service"

    cluster: SubjectName = Field("dev", description="Cluster that this process belongs to: 1 to 64 of A-Z a-z 0-9 _ -.")
    name: SubjectName = Field("", description="Name of this process in subjects and logs; its role unless given.")
    nats_url: str = Field(
        "nats://127.0.0.1:4222", description="NATS server of the control plane; of a cluster several, with commas."
    )
    nats_user: str = Field("", description="NATS user.")
    nats_password: SecretStr = Field(SecretStr(""), description="NATS password.")
    nats_token: SecretStr = Field(SecretStr(""), description="NATS token, instead of user and password.")
    nats_tls_ca: str = Field("", description="PEM file of the authority that signed the NATS server's certificate.")
    nats_tls_cert: str = Field("", description="PEM file of our own certificate, for a NATS server that asks for one.")
    nats_tls_key: str = Field("", description="PEM file of its private key.")
    data_key: SecretStr = Field(
        SecretStr(""), description="The cluster's data-plane key: 64 hexadecimal digits, the same on all workers."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    advertise_host: str = Field(
        "127.0.0.1",
        description="Address that others are told to connect to; auto: the one from which NATS is reached.",
    )
    otlp_endpoint: OtlpEndpoint = Field(
        "",
        description="OpenTelemetry collector that traces go to, by OTLP over HTTP, as http://127.0.0.1:4318; without "
        "one, OTEL_EXPORTER_OTLP_ENDPOINT; without either nothing is traced. Needs kvferry[otel].",
        json_schema_extra={"variable": "OTEL_EXPORTER_OTLP_ENDPOINT"},
    )
    log_level: LogLevel = Field("info", description="Least severe log lines to write.")
    log_format: LogFormat = Field("auto", description="Log lines: console on a terminal, else JSON.")
    scaling_file: Path | None = Field(
        None,
        description="This service's scaling.yaml, or a folder with gateway.yaml, prefill.yaml and decode.yaml; the one "
        "that came with the service unless given.",
    )
    run_file: Path | None = Field(
        None,
        description="Join the stack that wrote this run file; without a value, the one of `kvferry up`.",
        json_schema_extra={"flag": JOIN_FLAG},
    )

    @model_validator(mode="before")
    @classmethod
    def _name_defaults_to_role(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name"):
            return {**values, "name": cls.role}
        return values

    @classmethod
    def scaling_layer(cls, path: Path | None) -> Layer:
        scaling = SERVICES.get(cls.role)
        if scaling is None:
            return {}, str
        file = scaling_path(scaling.role, path)
        settings = scaling.read(path).settings
        for field in settings:
            if field not in cls.model_fields or field in NOT_OF_SCALE or is_secret(cls.model_fields[field]):
                raise SettingError(f"settings.{field} in {file}", f"is no setting of the {cls.role} that belongs here")
        return settings, lambda field: f"settings.{field} in {file}"

    @property
    def data_key_bytes(self) -> bytes:
        """The data key, 32 bytes. Raises `SettingError` when it is unset or malformed."""
        setting = env_name("data_key")
        text = self.data_key.get_secret_value()
        if not text:
            raise SettingError(setting, "is not set; join a run file with --join or give the cluster's key")
        try:
            key = bytes.fromhex(text)
        except ValueError:
            raise SettingError(setting, "is not hexadecimal") from None
        if len(key) != DATA_KEY_BYTES:
            raise SettingError(setting, f"has {len(key)} bytes, must have {DATA_KEY_BYTES}")
        return key


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings that are secret or name a secret's file: for children that need none of them, or
    get them otherwise."""
    return {name: value for name, value in environ.items() if not _SECRET_NAME.fullmatch(name)}


def env_name(field: str) -> str:
    return ENV_PREFIX + field.upper()


def flag_name(cls: type[Settings], field: str) -> str:
    extra = cls.model_fields[field].json_schema_extra
    if isinstance(extra, dict) and "flag" in extra:
        return str(extra["flag"])
    return "--" + field.replace("_", "-")


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
    login = run_file.login(cls.role)
    facts = {field: getattr(run_file, field) for field in RunFile.model_fields}
    facts |= {"nats_user": login.user, "nats_password": login.password}
    if "model" in cls.model_fields and not _is_list(cls.model_fields["model"]):
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
    """Secrets: the first lines of the files that the environment names. No error quotes one."""
    secrets: dict[str, object] = {}
    for field, spec in cls.model_fields.items():
        name = env_name(field) + FILE_SUFFIX
        if not is_secret(spec) or not environ.get(name):
            continue
        if environ.get(env_name(field)):
            raise SettingError(name, f"is set beside {env_name(field)}; give one of them")
        try:
            with open(environ[name], encoding="utf-8") as file:
                text = file.read(MAX_SECRET_CHARS + 1)
        except OSError as error:
            raise SettingError(name, f"{environ[name]}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SettingError(name, f"{environ[name]} is not UTF-8") from None
        if len(text) > MAX_SECRET_CHARS:
            raise SettingError(name, f"{environ[name]} is longer than {MAX_SECRET_CHARS} characters")
        secrets[field] = text.partition("\n")[0].rstrip("\r")
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
    if isinstance(value, str) and _is_list(field):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _joined(value: object) -> object:
    """A flag of a list may be given again and again."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _is_list(field: FieldInfo) -> bool:
    return typing.get_origin(_plain(field.annotation)) in (tuple, list, frozenset)


def _plain(annotation: Any) -> Any:
    """The annotation without `None` and without constraints."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(arm for arm in typing.get_args(annotation) if arm is not types.NoneType)
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


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


def is_secret(field: FieldInfo) -> bool:
    return _plain(field.annotation) is SecretStr


def metavar(field: FieldInfo) -> str:
    """What stands for the value in `--help` and in the documents."""
    kind = _plain(field.annotation)
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
    if _plain(spec.annotation) is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field, default=None, help=text)
    several = _is_list(spec)
    return click.option(flag, field, type=str, default=None, multiple=several, metavar=metavar(spec), help=text)
