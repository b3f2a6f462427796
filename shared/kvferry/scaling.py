"""`scaling.yaml`: how one service is scaled. The one source for the service itself, the containers and the chart.

    replicas     processes to start with
    resources    of one replica: cores and memory
    settings     the service's own settings that decide its size: batch and token budgets, bounds of queues
    targets      gateway: what placement aims at, in seconds
    models       gateway: targets of single models, over those
    autoscale    workers: between which bounds, and by what, replicas are added and drained

Each service's file lies beside its package, and inside it in a wheel. `--scaling-file` names another one, or a
folder with `gateway.yaml`, `prefill.yaml` and `decode.yaml`, so that one variable serves a whole stack.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from kvferry.errors import SettingError
from kvferry.yaml_file import read_mapping

FILE_NAME: Final = "scaling.yaml"
SCALING_FLAG: Final = "--scaling-file"
KV_MEMORY_MB: Final = 512  # of a worker whose file and settings say nothing of its KV pool

Role = Literal["gateway", "prefill", "decode"]
Share = Annotated[float, Field(gt=0, le=1)]
Duration = Annotated[float, Field(ge=0, le=3600)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Resources(_Section):
    """Of one replica."""

    cpus: Annotated[int, Field(ge=1)] = 1
    memory: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,8}(Mi|Gi)$")] = "1Gi"


class AutoscaleRules(_Section):
    """Bounds and patience, the same for both roles."""

    min_replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1024)] = 8
    up_after_s: Duration = 5.0  # more replicas have to be wanted for so long
    down_after_s: Duration = 120.0  # fewer have to be enough for so long

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class PrefillRules(AutoscaleRules):
    """What prefill replicas are wanted for."""

    utilisation: Share = 0.8  # of the time, computing
    ttft_share: Share = 0.5  # of the TTFT target that queues may take
    clear_s: Annotated[float, Field(gt=0, le=3600)] = 20.0  # within which longer queues should be gone


class DecodeRules(AutoscaleRules):
    """What decode replicas are wanted for: the largest number that one of these asks for is taken."""

    itl_share: Share = 0.8  # of the ITL target that an expected step may take
    kv_use: Share = 0.8  # of the KV blocks, held by requests
    # Tokens that one worker gives within the ITL target, as measured; None: learned while it runs.
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None


class ServiceScaling(_Section):
    """What every service's file has."""

    role: ClassVar[Role]

    replicas: Annotated[int, Field(ge=0, le=1024)] = 1
    resources: Resources = Resources()
    settings: dict[str, Any] = {}  # checked with all other settings

    @classmethod
    def read(cls, path: Path | None = None) -> Self:
        """From `path`, a file or a folder; else the one that came with the service. Raises `SettingError`."""
        file = scaling_path(cls.role, path)
        try:
            return cls.model_validate(read_mapping(file, SCALING_FLAG))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or cls.role
            problem = first["msg"].removeprefix("Value error, ").replace("Extra inputs are not permitted", "unknown")
            raise SettingError(f"{where} in {file}", problem[:1].lower() + problem[1:]) from None


class GatewayScaling(ServiceScaling):
    role: ClassVar[Role] = "gateway"

    targets: dict[str, Any] = {}  # checked by `kvferry_gateway.placement.scaling`
    models: dict[str, dict[str, Any]] = {}  # targets of single models, over those


class PrefillScaling(ServiceScaling):
    role: ClassVar[Role] = "prefill"

    autoscale: PrefillRules = PrefillRules()


class DecodeScaling(ServiceScaling):
    role: ClassVar[Role] = "decode"

    autoscale: DecodeRules = DecodeRules()


SERVICES: Final[Mapping[str, type[ServiceScaling]]] = {
    form.role: form for form in (GatewayScaling, PrefillScaling, DecodeScaling)
}


def scaling_path(role: Role, path: Path | None = None) -> Path:
    """The file that a service reads. Raises `SettingError` if `path` is None and the service came without one."""
    if path is not None:
        return path / f"{role}.yaml" if path.is_dir() else path
    spec = importlib.util.find_spec(f"kvferry_{role}")
    for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
        for file in (folder / FILE_NAME, folder.parent / FILE_NAME):  # in a wheel, in a checkout
            if file.is_file():
                return file
    raise SettingError(SCALING_FLAG, f"kvferry_{role} came without its {FILE_NAME}; name one")
