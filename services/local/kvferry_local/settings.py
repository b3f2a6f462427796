"""Settings of `kvferry up` and of the clients of a running stack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from kvferry.config import LogFormat, LogLevel, Port, Settings, SubjectName

MAX_PROCESSES = 64

Count = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]


class UpSettings(Settings):
    """The one-machine stack. What stands here is handed to the services; their own settings pass by environment."""

    role: ClassVar[str] = "up"

    model: str = Field("smollm2", description="Model: a known name, fetched once, or a directory in Hugging Face form.")
    served_model_name: str = Field("", description="Name that clients use for the model; the model's own unless given.")
    max_model_len: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Longest prompt plus output, in tokens; the model's own limit unless given."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Precision of weights and KV cache; auto is bfloat16."
    )
    engine: Literal["auto", "native", "torch"] = Field(
        "auto", description="Engine of the workers; auto is kvferry's own on a CPU where it can run, else torch."
    )
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8 takes half the memory of bfloat16 and decodes faster; native engine only."
    )
    prefill: Annotated[int, Field(ge=0, le=MAX_PROCESSES)] = Field(
        1, description="Prefill workers; 0 lets decode workers prefill too, the single-worker baseline."
    )
    decode: Count = Field(1, description="Decode workers.")
    gateways: Count = Field(1, description="Gateways, on consecutive ports.")
    transport: Literal["auto", "ucx", "tcp"] = Field(
        "auto", description="Data plane between the workers; auto is UCX where it is installed, else TCP."
    )
    host: str = Field("127.0.0.1", description="Address that the gateways listen on.")
    port: Port = Field(8000, description="Port of the first gateway; 0 takes free ones.")
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Compute threads per worker; the cores shared out over the workers unless given."
    )
    pin: bool = Field(False, description="Keep each worker on its own cores.")
    api_key_file: Path | None = Field(None, description="Bearer keys that the gateways accept, one a line.")
    cors_origins: tuple[str, ...] = Field((), description="Origins whose pages may call the gateways; * is any.")
    cluster: SubjectName = Field("dev", description="Name of the cluster.")
    nats_url: str = Field("", description="NATS server to use; an embedded one is started unless given.")
    nats_user: str = Field("", description="NATS user.")
    nats_password: SecretStr = Field(SecretStr(""), description="NATS password.")
    nats_token: SecretStr = Field(SecretStr(""), description="NATS token, instead of user and password.")
    nats_tls_ca: str = Field("", description="PEM file of the authority that signed the NATS server's certificate.")
    data_key: SecretStr = Field(
        SecretStr(""), description="The cluster's data-plane key, 64 hexadecimal digits; random unless given."
    )
    drain_grace: Annotated[float, Field(gt=0, le=3600)] = Field(
        30.0, description="Seconds that each role gets to drain on Ctrl-C before it is killed."
    )
    run_file: Path | None = Field(
        None, description="Where to write the run file; under $XDG_RUNTIME_DIR or ~/.local/state unless given."
    )
    log_level: LogLevel = Field("info", description="Least severe log lines to write.")
    log_format: LogFormat = Field("auto", description="Log lines: console on a terminal, else JSON.")

    @model_validator(mode="after")
    def _ports_fit(self) -> Self:
        if self.port + self.gateways - 1 > 65535:
            raise ValueError(f"--port {self.port} leaves no room for --gateways {self.gateways}")
        return self


class ClientSettings(Settings):
    """A client of a running stack: `chat`, `status`, `drain`."""

    role: ClassVar[str] = "client"

    url: str = Field("", description="Base URL of a gateway; the run file's first one unless given.")
    api_key: SecretStr = Field(SecretStr(""), description="Bearer key of the gateway.")
    cluster: SubjectName = Field("dev", description="Cluster whose run file is read.")
    run_file: Path | None = Field(None, description="Run file of the stack to talk to.")
