"""What a runner is made from, and the values that settings and checkpoint give together. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kvferry.engine.checkpoint import weights_fingerprint
from kvferry.engine.config import DTYPES, ModelConfig
from kvferry.errors import SettingError
from kvferry.schedule.step import KVFormat

DEFAULT_KV_CACHE_BYTES: Final = 1 << 30
QUANTIZATIONS: Final = ("none", "int8")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What a runner is made from. `num_blocks` wins over `kv_cache_bytes`."""

    model_dir: Path
    device: str = "cpu"
    dtype: str = "auto"  # "auto": the checkpoint's own
    num_blocks: int | None = None
    kv_cache_bytes: int = DEFAULT_KV_CACHE_BYTES
    block_size: int = 16
    max_model_len: int | None = None  # None: what the model was made for
    threads: int | None = None  # None: the runner decides
    quantization: str = "none"  # of weights and activations; "int8": the native runner alone
    isa: str = "auto"  # instruction set of the native runner; "auto": the best that this CPU has
    tensor_parallel_size: int = 1  # ranks that the model is split over
    remote_ranks: int = 0  # of these, the last ones, that are on other hosts

    def as_fields(self) -> dict[str, str | int | None]:
        """For a message; `of_fields` reads it."""
        return {**asdict(self), "model_dir": str(self.model_dir)}

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> EngineSettings:
        return cls(**{**fields, "model_dir": Path(fields["model_dir"])})

    def check_positive(self) -> None:
        """Raises `SettingError` for a count that is none."""
        for setting in ("threads", "block_size", "num_blocks", "max_model_len", "tensor_parallel_size"):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise SettingError(setting, f"{value} is not positive")


def resolved_dtype(settings: EngineSettings, config: ModelConfig) -> str:
    name = config.dtype if settings.dtype == "auto" else settings.dtype
    if name not in DTYPES:
        raise SettingError("dtype", f"{settings.dtype!r}, supported: auto, {', '.join(DTYPES)}")
    return name


def resolved_max_model_len(settings: EngineSettings, config: ModelConfig) -> int:
    wanted = settings.max_model_len
    if wanted is None:
        return config.max_context
    if wanted > config.max_context:
        raise SettingError("max_model_len", f"{wanted}, the model's context is {config.max_context}")
    return wanted


def kv_format_of(settings: EngineSettings, config: ModelConfig, dtype: str) -> KVFormat:
    """Reads all weight files, for their fingerprint.

    Runners of one checkpoint, dtype, block size and quantization have one format, whatever computes in them.
    """
    format_id = identity_of(weights_fingerprint(settings.model_dir), settings, config, dtype)
    return KVFormat(
        config.num_layers, config.num_kv_heads, config.head_dim, dtype, settings.block_size, format_id
    )  # fmt: skip


def identity_of(weights: str, settings: EngineSettings, config: ModelConfig, dtype: str) -> str:
    """Of weights with a fingerprint and of how they are computed: where it is equal, KV has one meaning."""
    identity: tuple[object, ...] = (
        weights, dtype, settings.block_size, config.rope,
        config.num_layers, config.num_kv_heads, config.head_dim, config.windows, config.rms_norm_eps,
    )  # fmt: skip
    if settings.quantization != "none":
        identity += (settings.quantization,)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def resolved_num_blocks(settings: EngineSettings, kv_format: KVFormat) -> int:
    if settings.num_blocks is not None:
        return settings.num_blocks
    block_bytes = kv_format.token_bytes * kv_format.block_size
    if settings.kv_cache_bytes < block_bytes:
        raise SettingError("kv_cache_bytes", f"{settings.kv_cache_bytes}, one block takes {block_bytes}")
    return settings.kv_cache_bytes // block_bytes
