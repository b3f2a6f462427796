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
CPUS: Final = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Place:
    """What is known only when the stack starts."""

    run_file: Path
    model_dir: Path
    served_model_name: str
    ports: tuple[int, ...]  # one per gateway
    cores: tuple[int, ...]  # that this process may run on
    log_format: str  # console or json


class Plan:
    """The programs of one stack: those that it begins with, and workers that are added later."""

    def __init__(self, settings: UpSettings, place: Place) -> None:
        self._settings = settings
        self._place = place
        self._num_first: dict[Role, int] = {"prefill": settings.prefill, "decode": settings.decode}
        self._num_workers = settings.prefill + settings.decode
        self._threads = settings.threads or max(1, len(place.cores) // self._num_workers)
        self._pinned = settings.pin == "auto" and self._num_workers * self._threads <= len(place.cores)
        self._shared = _flags(
            join=place.run_file,
            model=place.model_dir,
            served_model_name=place.served_model_name,
            scaling_file=settings.scaling_file,
            log_level=settings.log_level,
            log_format=place.log_format,
        )

    def programs(self) -> list[Program]:
        """Prefill and decode workers, gateways, in the order in which they start."""
        workers = [self.worker(role, index) for role, count in self._num_first.items() for index in range(count)]
        return workers + [self._gateway(index, port) for index, port in enumerate(self._place.ports)]

    def worker(self, role: Role, index: int) -> Program:
        """The worker `role`-`index`; from the stack's own number on it is one that was added."""
        settings, threads = self._settings, self._threads
        name = worker_name(role, index)
        cpus = own_cores(self._place.cores, self._seat(role, index), threads) if self._pinned else None
        flags = _flags(
            name=name,
            cpus=cpus,
            dtype=settings.dtype,
            engine=settings.engine,
            quantization=settings.quantization,
            max_model_len=settings.max_model_len,
            transport=settings.transport,
            threads=threads,
        )
        # libgomp reads it when torch is imported, long before the worker could set it.
        environ = {"OMP_NUM_THREADS": str(threads)}
        return Program(name, role, (*PYTHON, f"kvferry_{role}", *self._shared, *flags), environ)

    def _seat(self, role: Role, index: int) -> int:
        """A worker's place among all: those of the start in their order, then prefill and decode in turn."""
        first = self._num_first[role]
        if index < first:
            return index if role == "prefill" else self._num_first["prefill"] + index
        return self._num_workers + 2 * (index - first) + (role == "decode")

    def _gateway(self, index: int, port: int) -> Program:
        settings = self._settings
        own = _flags(
            name=f"gateway-{index}",
            host=settings.host,
            port=port,
            api_key_file=settings.api_key_file,
            cors_origins=",".join(settings.cors_origins) or None,
        )
        return Program(f"gateway-{index}", "gateway", (*PYTHON, "kvferry_gateway", *self._shared, *own))


def worker_name(role: Role, index: int) -> str:
    return f"{role}-{index}"


def usable_cores(cpus: Path = CPUS) -> tuple[int, ...]:
    """The cores that this process may run on; those of one physical core beside each other, then those of a socket."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0), key=lambda core: (*_place_of(core, cpus), core)))
    return tuple(range(os.cpu_count() or 1))


def _place_of(core: int, cpus: Path) -> tuple[int, int]:
    """(socket, physical core) of a logical one; its own number where the system does not tell."""
    topology = cpus / f"cpu{core}" / "topology"
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text())
    except (OSError, ValueError):
        return 0, core


def own_cores(cores: Sequence[int], seat: int, threads: int) -> str | None:
    """`threads` cores that no other seat has, as `--cpus` takes them; None where they have run out."""
    own = cores[seat * threads : (seat + 1) * threads]
    return ",".join(map(str, sorted(own))) if len(own) == threads else None


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
