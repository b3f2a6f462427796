"""What is set: one frozen object per service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator

from kvferry.config.environment import env_name
from kvferry.config.field import JOIN_FLAG, is_secret
from kvferry.errors import SettingError
from kvferry.scaling import SERVICES, scaling_path

DATA_KEY_BYTES: Final = 32
# What tells one process from another has no place in a file that all replicas share.
NOT_OF_SCALE: Final = frozenset({"name", "cluster", "run_file", "scaling_file"})
SubjectName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Port = Annotated[int, Field(ge=0, le=65535)]
OtlpEndpoint = Annotated[str, StringConstraints(pattern=r"^(https?://\S+)?$")]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
Layer = tuple[Mapping[str, object], Callable[[str], str]]  # values, and how the user wrote a field's name


class Settings(BaseModel):
    """Base of every settings object. `role` names its command and its section in the documents."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    role: ClassVar[str]

    @classmethod
    def scaling_layer(cls, path: Path | None) -> Layer:
        """What `scaling.yaml` says: `path` if one was named. Raises `SettingError`."""
        return {}, str


class ProcessSettings(Settings):
    """What every process of a cluster needs."""

    role: ClassVar[str] = "process"

    cluster: SubjectName = Field("dev", description="Cluster that this process belongs to: 1 to 64 of A-Z a-z 0-9 _ -.")
    name: SubjectName = Field("", description="Name of this process in subjects and logs; its role unless given.")
    data_key: SecretStr = Field(
        SecretStr(""), description="The cluster's data-plane key: 64 hexadecimal digits, the same on all workers."
    )
    log_level: LogLevel = Field("info", description="Least severe log lines to write.")
    log_format: LogFormat = Field("auto", description="Log lines: console on a terminal, else JSON.")
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


class ServiceSettings(ProcessSettings):
    """What every service needs. Services subclass it and set `role`."""

    role: ClassVar[str] = "service"

    nats_url: str = Field(
        "nats://127.0.0.1:4222", description="NATS server of the control plane; of a cluster several, with commas."
    )
    nats_user: str = Field("", description="NATS user.")
    nats_password: SecretStr = Field(SecretStr(""), description="NATS password.")
    nats_token: SecretStr = Field(SecretStr(""), description="NATS token, instead of user and password.")
    nats_tls_ca: str = Field("", description="PEM file of the authority that signed the NATS server's certificate.")
    nats_tls_cert: str = Field("", description="PEM file of our own certificate, for a NATS server that asks for one.")
    nats_tls_key: str = Field("", description="PEM file of its private key.")
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
    scaling_file: Path | None = Field(
        None,
        description="This service's scaling.yaml, or a folder with gateway.yaml, prefill.yaml and decode.yaml; the one "
        "that came with the service unless given.",
    )

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
