"""From the settings of `kvferry up` to the programs that it runs. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvferry_local.process import Program
from kvferry_local.settings import UpSettings
from kvferry_local.supervision import Role

# -P keeps the caller's working directory from shadowing modules.
PYTHON: Final = (sys.executable, "-P", "-m")


@dataclass(frozen=True, slots=True)
class Place:
    """What is known only when the stack starts."""

    run_file: Path
    model_dir: Path
    served_model_name: str
    ports: tuple[int, ...]  # one per gateway
    cores: tuple[int, ...]  # that this process may run on
    log_format: str  # console or json


def programs(settings: UpSettings, place: Place) -> list[Program]:
    """Gateways, prefill and decode workers, in the order in which they start."""
    workers = [f"prefill-{i}" for i in range(settings.prefill)] + [f"decode-{i}" for i in range(settings.decode)]
    threads = settings.threads or max(1, len(place.cores) // len(workers))
    shared = _flags(
        join=place.run_file,
        model=place.model_dir,
        served_model_name=place.served_model_name,
        log_level=settings.log_level,
        log_format=place.log_format,
    )
    worker = _flags(
        dtype=settings.dtype,
        engine=settings.engine,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        transport=settings.transport,
        threads=threads,
    )
    planned = []
    for index, name in enumerate(workers):
        role: Role = "prefill" if name.startswith("prefill") else "decode"
        own = _flags(name=name, cpus=share_of_cores(place.cores, index, threads) if settings.pin else None)
        command = (*PYTHON, f"kvferry_{role}", *shared, *own, *worker)
        # libgomp reads it when torch is imported, long before the worker could set it.
        planned.append(Program(name, role, command, {"OMP_NUM_THREADS": str(threads)}))
    for index, port in enumerate(place.ports):
        own = _flags(
            name=f"gateway-{index}",
            host=settings.host,
            port=port,
            api_key_file=settings.api_key_file,
            cors_origins=",".join(settings.cors_origins) or None,
        )
        planned.append(Program(f"gateway-{index}", "gateway", (*PYTHON, "kvferry_gateway", *shared, *own)))
    return planned


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def share_of_cores(cores: Sequence[int], index: int, threads: int) -> str:
    """`threads` cores for worker `index`, as `--cpus` takes them; workers share cores only where there are too few."""
    count = min(threads, len(cores))
    return ",".join(str(core) for core in sorted(cores[(index * count + i) % len(cores)] for i in range(count)))


def _flags(**values: object) -> tuple[str, ...]:
    flags: list[str] = []
    for field, value in values.items():
        if value is not None:
            flags += ["--" + field.replace("_", "-"), str(value)]
    return tuple(flags)


def ready_message(url: str, model: str, num_prefill: int, num_decode: int, seconds: float) -> str:
    """What the operator sees when the stack is ready: address and a line to paste."""
    workers = f"{num_prefill} prefill + {num_decode} decode" if num_prefill else f"{num_decode} decode, no prefill"
    return (
        f"\nkvferry is ready on {url} after {seconds:.1f} s: {model}, {workers}\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "stream": true, "max_tokens": 200, '
        f'"messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}\'\n\n'
        "Ctrl-C drains and stops."
    )
