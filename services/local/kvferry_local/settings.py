"""Settings of `kvferry up` and of the clients of a running stack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, SecretStr, model_validator

from kvferry.config.settings import Layer, LogFormat, LogLevel, Port, Settings, SubjectName
from kvferry.errors import SettingError
from kvferry.scaling import SERVICES, Role, scaling_path

MAX_PROCESSES: Final = 64
TLS_CA: Final = (
    "PEM file of the authority that signed the gateway's certificate; the system's authorities unless given. A stack "
    "of this machine is known by its run file."
)
REPLICAS_OF: Final[Mapping[str, Role]] = {"prefill": "prefill", "decode": "decode", "gateways": "gateway"}

Count = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]
Ranks = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]


class UpSettings(Settings):
    """The one-machine stack. What stands here is handed to the services; their own settings pass by environment."""

    role: ClassVar[str] = "up"

    model: tuple[str, ...] = Field(
        ("smollm2",),
        description="Models: known names, fetched once, or directories in Hugging Face form; NAME=MODEL where clients "
        "call one NAME.",
    )
    served_model_name: str = Field(
        "", description="Name that clients use where there is one model; its own unless given."
    )
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
        1, description="Prefill workers of each model; 0 lets decode workers prefill too, the single-worker baseline."
    )
    decode: Count = Field(1, description="Decode workers of each model.")
    gateways: Count = Field(1, description="Gateways, on consecutive ports.")
    transport: Literal["auto", "ucx", "tcp"] = Field(
        "auto", description="Data plane between the workers; auto is UCX where it is installed, else TCP."
    )
    scaling_file: Path | None = Field(
        None,
        description="Folder with gateway.yaml, prefill.yaml and decode.yaml: how many of each, and how much each takes "
        "on; the files that came with the services unless given.",
    )
    host: str = Field("127.0.0.1", description="Address that the gateways listen on.")
    port: Port = Field(8000, description="Port of the first gateway; 0 takes free ones.")
    tensor_parallel_size: Ranks = Field(
        1, description="Ranks of each worker: processes that its model is split over. The roles may differ."
    )
    prefill_tensor_parallel_size: Ranks | None = Field(
        None, description="Ranks of each prefill worker; --tensor-parallel-size unless given."
    )
    decode_tensor_parallel_size: Ranks | None = Field(
        None, description="Ranks of each decode worker; --tensor-parallel-size unless given."
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Compute threads of each rank of a worker; the cores shared out over all ranks unless given."
    )
    pin: Literal["auto", "off"] = Field(
        "off", description="auto: each worker on cores of its own, where there are as many as all of them have threads."
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of the gateways' certificate for HTTPS, and of those that lead to its authority."
    )
    tls_key: Path | None = Field(None, description="PEM file of its private key; the certificate's file unless given.")
    tls_key_password: SecretStr = Field(SecretStr(""), description="Password of an encrypted private key.")
    api_key_file: Path | None = Field(
        None, description="Bearer keys that the gateways accept, one a line, with their rate limits."
    )
    cors_origins: tuple[str, ...] = Field((), description="Origins whose pages may call the gateways; * is any.")
    cluster: SubjectName = Field("dev", description="Name of the cluster.")
    nats_url: str = Field("", description="NATS server to use; an embedded one is started unless given.")
    nats_user: str = Field("", description="NATS user.")
    nats_password: SecretStr = Field(SecretStr(""), description="NATS password.")
    nats_credentials: Path | None = Field(
        None,
        description="Directory that `kvferry credentials` has written: a NATS user for each role, and the data key. "
        "Without it --nats-user is every role's.",
    )
    nats_token: SecretStr = Field(SecretStr(""), description="NATS token, instead of user and password.")
    nats_tls_ca: str = Field("", description="PEM file of the authority that signed the NATS server's certificate.")
    nats_tls_cert: str = Field("", description="PEM file of our own certificate, for a NATS server that asks for one.")
    nats_tls_key: str = Field("", description="PEM file of its private key.")
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

    @classmethod
    def scaling_layer(cls, path: Path | None) -> Layer:
        """As many processes as each service's `scaling.yaml` says."""
        if path is not None and not path.is_dir():
            raise SettingError("--scaling-file", f"{path} is no folder; the services of one stack have a file each")
        counts = {field: SERVICES[role].read(path).replicas for field, role in REPLICAS_OF.items()}
        return counts, lambda field: f"replicas in {scaling_path(REPLICAS_OF[field], path)}"

    def ranks(self, role: Role) -> int:
        """Of each worker of a role."""
        own = {"prefill": self.prefill_tensor_parallel_size, "decode": self.decode_tensor_parallel_size}
        return own.get(role) or self.tensor_parallel_size

    @model_validator(mode="after")
    def _one_kind_of_login(self) -> Self:
        if self.nats_credentials is not None:
            if not self.nats_url:
                raise ValueError("--nats-credentials is for a NATS server of your own, and there is no --nats-url")
            if self.nats_user or self.nats_password.get_secret_value() or self.nats_token.get_secret_value():
                raise ValueError("--nats-credentials names a user for each role; there is another one beside it")
        return self

    @model_validator(mode="after")
    def _ports_fit(self) -> Self:
        if self.port + self.gateways - 1 > 65535:
            raise ValueError(f"--port {self.port} leaves no room for --gateways {self.gateways}")
        return self


class ClientSettings(Settings):
    """A client of a running stack: `chat`, `status`, `drain`, `scale`."""

    role: ClassVar[str] = "client"

    url: str = Field("", description="Base URL of a gateway; the run file's first one unless given.")
    api_key: SecretStr = Field(SecretStr(""), description="Bearer key of the gateway.")
    tls_ca: Path | None = Field(None, description=TLS_CA)
    cluster: SubjectName = Field("dev", description="Cluster whose run file is read.")
    run_file: Path | None = Field(None, description="Run file of the stack to talk to.")


class AutoscaleSettings(ClientSettings):
    """`kvferry autoscale`. Bounds and rules stand in the workers' `scaling.yaml`."""

    role: ClassVar[str] = "autoscale"

    # Not `model`: KVFERRY_MODEL is the directory that services load.
    served_model_name: str = Field(
        "",
        description="Model whose workers are scaled; every one's unless given.",
        json_schema_extra={"flag": "--model"},
    )

    target: Literal["local", "compose", "command"] = Field(
        "local", description="Who starts and drains workers: `kvferry up` here, docker compose here, or --command."
    )
    command: str = Field(
        "",
        description="Command with {role}, {replicas} and, for several models, {model} in it, run without a shell, as "
        "'kubectl scale statefulset/kvferry-{role} --replicas={replicas}'. It must let workers drain.",
    )
    interval: Annotated[float, Field(ge=0.25, le=60)] = Field(1.0, description="Seconds between two looks.")
    dry_run: bool = Field(False, description="Only say what would be done.")
    scaling_file: Path | None = Field(
        None,
        description="Folder with prefill.yaml and decode.yaml; the files that came with the services unless given.",
    )
    log_level: LogLevel = Field("info", description="Least severe log lines to write.")
    log_format: LogFormat = Field("auto", description="Log lines: console on a terminal, else JSON.")


class CredentialsSettings(Settings):
    """`kvferry credentials`."""

    role: ClassVar[str] = "credentials"

    cluster: SubjectName = Field("dev", description="Name of the cluster, which its NATS users are named by.")


class DoctorSettings(UpSettings):
    """`kvferry doctor`: what `kvferry up` would be started with, and where a stack may run already."""

    role: ClassVar[str] = "doctor"

    device: str = Field("cpu", description="Where the model runs: cpu, or a torch device as cuda or cuda:1.")
    ucx_net_devices: str = Field("lo", description="UCX_NET_DEVICES of the data plane.")
    tls_ca: Path | None = Field(None, description=TLS_CA)
    run_file: Path | None = Field(None, description="Run file of a stack to look at; the one that `kvferry up` writes.")
    peers: tuple[str, ...] = Field(
        (), description="Base URLs of gateways whose clocks, and whose workers' clocks, are compared with this one."
    )


class BenchSettings(ClientSettings):
    """`kvferry bench`. Seconds, tokens."""

    role: ClassVar[str] = "bench"

    # Not `model`: KVFERRY_MODEL is the directory that services load.
    served_model_name: str = Field(
        "",
        description="Name of the model in requests; the first that the server lists unless given.",
        json_schema_extra={"flag": "--model"},
    )
    endpoint: Literal["chat", "completions"] = Field("completions", description="Route that requests go to.")
    trace: Path | None = Field(None, description="Recorded load: Azure's .csv or Mooncake's .jsonl.")
    speed: Annotated[float, Field(gt=0, le=1e6)] = Field(1.0, description="How many times as fast the trace is played.")
    length_scale: Annotated[float, Field(gt=0, le=1e3)] = Field(1.0, description="Factor of the trace's lengths.")
    requests: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="How many; 100, or all of a trace, unless given."
    )
    rate: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Requests a second on average; 1, or a trace's own, unless given."
    )
    pattern: Literal["poisson", "constant", "bursts", "ramp"] = Field(
        "poisson", description="How requests without a trace arrive."
    )
    concurrency: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0, description="So many clients that ask again once they are answered, instead of a rate; 0: by rate."
    )
    prompt_tokens: Annotated[int, Field(ge=1, le=10_000_000)] = Field(512, description="Median prompt, about.")
    output_tokens: Annotated[int, Field(ge=1, le=10_000_000)] = Field(64, description="Median output, at most.")
    ignore_eos: bool = Field(False, description="Ask for outputs of full length, as kvferry and vLLM allow.")
    ttft_target: Annotated[float, Field(gt=0)] = Field(1.0, description="TTFT that goodput counts.")
    tpot_target: Annotated[float, Field(gt=0)] = Field(0.05, description="Time per output token that goodput counts.")
    timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(600.0, description="Seconds that a request may take.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="The same seed draws the same load.")
    json_file: Path | None = Field(
        None, description="Write everything that was measured there.", json_schema_extra={"flag": "--json"}
    )
    svg: Path | None = Field(None, description="Write a picture there.")
