"""From the settings of `kvferry up` to the programs that it runs. Pure."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvferry.config.environment import env_name
from kvferry.model_source import ModelSource
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
    models: tuple[ModelSource, ...]  # each with its name and its directory
    ports: tuple[int, ...]  # one per gateway
    cores: tuple[int, ...]  # that this process may run on
    log_format: str  # console or json


class Plan:
    """The programs of one stack: those that it begins with, and workers that are added later."""

    def __init__(self, settings: UpSettings, place: Place) -> None:
        self._settings = settings
        self._place = place
        self._per_model: dict[Role, int] = {"prefill": settings.prefill, "decode": settings.decode}
        self._num_first = {role: count * len(place.models) for role, count in self._per_model.items()}
        self._num_workers = sum(self._num_first.values())
        num_ranks = sum(count * settings.ranks(role) for role, count in self._num_first.items())
        self._threads = settings.threads or max(1, len(place.cores) // num_ranks)
        self._pinned = settings.pin == "auto" and num_ranks * self._threads <= len(place.cores)
        self._shared = _flags(
            join=place.run_file,
            scaling_file=settings.scaling_file,
            log_level=settings.log_level,
            log_format=place.log_format,
        )

    def programs(self) -> list[Program]:
        """Prefill and decode workers, gateways, in the order in which they start."""
        workers = [
            self.worker(role, index, model) for role in self._num_first for model, index in self.first_workers(role)
        ]
        return workers + [self._gateway(index, port) for index, port in enumerate(self._place.ports)]

    @property
    def models(self) -> tuple[ModelSource, ...]:
        return self._place.models

    def first_workers(self, role: Role) -> list[tuple[ModelSource, int]]:
        """The workers of a role that the stack begins with: model and index. Names are numbered over all models."""
        per_model = self._per_model[role]
        return [(model, at * per_model + i) for at, model in enumerate(self.models) for i in range(per_model)]

    def worker(self, role: Role, index: int, model: ModelSource) -> Program:
        """The worker `role`-`index`; from the stack's own number on it is one that was added."""
        settings, threads = self._settings, self._threads
        name = worker_name(role, index)
        ranks = settings.ranks(role)
        seat = self._seat(role, index)
        cpus = own_cores(self._place.cores, seat * threads, ranks * threads) if self._pinned else None
        flags = _flags(
            name=name,
            model=model,
            served_model_name=model.name,
            cpus=cpus,
            dtype=settings.dtype,
            engine=settings.engine,
            quantization=settings.quantization,
            max_model_len=settings.max_model_len,
            transport=settings.transport,
            threads=threads,
            tensor_parallel_size=ranks if ranks > 1 else None,
        )
        # libgomp reads it when torch is imported, long before the worker could set it.
        environ = {"OMP_NUM_THREADS": str(threads)}
        return Program(name, role, (*PYTHON, f"kvferry_{role}", *self._shared, *flags), environ)

    def _seat(self, role: Role, index: int) -> int:
        """The place of a worker's first rank among all: those of the start in the order of their workers, then those
        of prefill and decode workers in turn."""
        first, ranks = self._num_first, {role: self._settings.ranks(role) for role in self._num_first}
        if index < first[role]:
            return index * ranks[role] + (first["prefill"] * ranks["prefill"] if role == "decode" else 0)
        num_first = sum(first[each] * ranks[each] for each in first)
        added = (index - first[role]) * sum(ranks.values())
        return num_first + added + (ranks["prefill"] if role == "decode" else 0)

    def _gateway(self, index: int, port: int) -> Program:
        settings = self._settings
        own = _flags(
            name=f"gateway-{index}",
            model=self.models,
            served_model_name=self.models[0].name if len(self.models) == 1 else "",
            host=settings.host,
            port=port,
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            api_key_file=settings.api_key_file,
            cors_origins=",".join(settings.cors_origins) or None,
        )
        # The one secret that the run file does not carry: no other process needs it.
        password = settings.tls_key_password.get_secret_value()
        environ = {env_name("tls_key_password"): password} if password else {}
        return Program(f"gateway-{index}", "gateway", (*PYTHON, "kvferry_gateway", *self._shared, *own), environ)


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


def own_cores(cores: Sequence[int], first: int, count: int) -> str | None:
    """`count` cores from the `first` on, as `--cpus` takes them; None where they have run out."""
    own = cores[first : first + count]
    return ",".join(map(str, sorted(own))) if len(own) == count else None


def _flags(**values: object) -> tuple[str, ...]:
    flags: list[str] = []
    for field, value in values.items():
        for part in value if isinstance(value, tuple) else (value,):
            if part is not None:
                flags += ["--" + field.replace("_", "-"), str(part)]
    return tuple(flags)


def curl_options(settings: UpSettings) -> str:
    """What curl needs besides the address: whom to trust, and a key."""
    options = f"--cacert {shlex.quote(str(settings.tls_cert))} " if settings.tls_cert else ""
    return options + (f'-H "authorization: Bearer ${env_name("api_key")}" ' if settings.api_key_file else "")


def ready_message(
    url: str, models: Sequence[str], num_prefill: int, num_decode: int, seconds: float, options: str = ""
) -> str:
    """What the operator sees when the stack is ready: address and a line to paste. Numbers are of each model."""
    workers = f"{num_prefill} prefill + {num_decode} decode" if num_prefill else f"{num_decode} decode, no prefill"
    each = " each" if len(models) > 1 else ""
    model = models[0]
    return (
        f"\nkvferry is ready on {url} after {seconds:.1f} s: {', '.join(models)}, {workers}{each}\n\n"
        f"  curl -N {options}{url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "stream": true, "max_tokens": 200, '
        f'"messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}\'\n\n'
        "Ctrl-C drains and stops."
    )
