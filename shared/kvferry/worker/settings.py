"""Settings that prefill and decode workers share. Each limit stands in `docs/protocol.md`, too."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kvferry.config.settings import Port, ProcessSettings, ServiceSettings
from kvferry.engine.ranks.shard import MAX_RANKS
from kvferry.model_source import ModelSource, model_sources
from kvferry.scaling import KV_MEMORY_MB

Positive = Annotated[int, Field(ge=1)]
Duration = Annotated[float, Field(gt=0, le=3600)]


class WorkerSettings(ServiceSettings):
    """A worker: one model, one engine thread, one data-plane address."""

    model: str = Field("", description="Model directory in Hugging Face form, or NAME=DIRECTORY.")
    served_model_name: str = Field("", description="Name of the model in requests; the directory's name unless given.")
    max_model_len: Annotated[int, Field(ge=0)] = Field(
        0, description="Longest prompt + output in tokens; 0: what the model and the KV pool allow."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Weights and KV dtype.")
    exactness: Literal["auto", "exact", "fast"] = Field(
        "auto", description="exact: bits do not depend on the batch (not every engine can); auto: exact where offered."
    )
    engine: Literal["auto", "native", "torch"] = Field(
        "auto", description="native: kvferry's own CPU kernels, bf16; auto: native where it can run, else torch."
    )
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: weights in 8 bits, activations too while they are multiplied; native engine only."
    )
    isa: Literal["auto", "amx", "avx512", "avx2", "portable"] = Field(
        "auto", description="Instruction set of the native engine; auto: the best that this processor has."
    )
    device: str = Field("cpu", description="Where the model runs: cpu, or a torch device as cuda or cuda:1.")
    threads: Positive = Field(
        1, description="Compute threads of each rank; workers that share cores must not ask for more in sum."
    )
    tensor_parallel_size: Annotated[int, Field(ge=1, le=MAX_RANKS)] = Field(
        1,
        description="Processes that the model is split over, each with its own threads; prefill and decode may differ.",
    )
    remote_ranks: Annotated[int, Field(ge=0, lt=MAX_RANKS)] = Field(
        0, description="Ranks of these that join from other hosts, by `kvferry rank`; the torch engine's alone."
    )
    rank_port: Port = Field(0, description="Port on `host` where remote ranks join; 0: any free one, see the log.")
    cpus: str = Field("", description="Pin the process to these cores, as 0,2 or 0-3; empty: not pinned.")
    block_size: Annotated[int, Field(ge=1, le=256)] = Field(
        16, description="Tokens per KV block; equal on all workers."
    )
    num_blocks: Annotated[int, Field(ge=0)] = Field(0, description="KV blocks; 0: from kv_memory_mb.")
    kv_memory_mb: Positive = Field(KV_MEMORY_MB, description="Memory of the KV pool in MiB, where num_blocks is 0.")
    transport: Literal["auto", "ucx", "tcp"] = Field(
        "auto", description="Data plane: UCX, TCP, or UCX where it imports and TCP otherwise."
    )
    data_port: Port = Field(0, description="Port of the data plane where the backend listens; 0: any free one.")
    ucx_net_devices: str = Field("lo", description="UCX_NET_DEVICES of the data plane, unless that variable is set.")
    slot_kb: Annotated[int, Field(ge=64, le=64 * 1024)] = Field(
        4096, description="Payload of one staging slot in KiB, the largest KV frame; equal on all workers."
    )
    num_slots: Annotated[int, Field(ge=2, le=1024)] = Field(16, description="Staging slots.")
    debug_port: Port = Field(0, description="HTTP port of /health, /ready, /metrics and /debug; 0: any free one.")
    max_waiting: Positive = Field(256, description="Requests that may wait; one more is refused with 429.")
    max_num_batched_tokens: Positive = Field(512, description="Most rows of one engine step.")
    overtake_ms: Annotated[int, Field(ge=0)] = Field(
        500, description="How long younger requests may pass one that waits for memory."
    )
    step_timeout: Duration = Field(30.0, description="Seconds of one engine step after which the worker is wedged.")
    bus_grace: Duration = Field(30.0, description="Seconds that running sequences go on without the bus.")
    drain_grace: Duration = Field(20.0, description="Seconds that a draining worker gives its sequences.")
    debug_digests: bool = Field(
        False, description="Keep a digest of every transferred token slot for /debug/digests (tests and benchmarks)."
    )

    @property
    def source(self) -> ModelSource:
        """Its model, which must be set. Raises `SettingError`."""
        (source,) = model_sources((self.model,), self.served_model_name)
        return source


class RankSettings(ProcessSettings):
    """Of a rank on another host. What it computes is its leader's to say."""

    role: ClassVar[str] = "rank"

    leader: str = Field("", description="HOST:PORT of its leader's --rank-port.")
    # Not `model`, which a run file tells: that is the leader's directory.
    model_dir: str = Field("", description="Directory of the same model here; where the leader has it unless given.")
    device: str = Field("", description="Where it computes, as cuda:1; on the leader's device unless given.")
    host: str = Field(
        "",
        description="Address that its data plane listens on and others connect to; the one from which it reaches its "
        "leader unless given.",
    )
    data_port: Port = Field(0, description="Port of the data plane where the backend listens; 0: any free one.")
    ucx_net_devices: str = Field("lo", description="UCX_NET_DEVICES of the data plane, unless that variable is set.")
