"""The loop of `kvferry autoscale`: look at the cluster through a gateway, judge, order."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import httpx

from kvferry.errors import KvferryError, SettingError
from kvferry.log import get_logger
from kvferry.runfile import default_run_file
from kvferry.runtime import TaskSet, now, stop_signals
from kvferry.scaling import DecodeScaling, PrefillScaling
from kvferry_gateway.placement.targets import Targets
from kvferry_local.autoscale.autoscaler import SCALED, Advice, Autoscaler
from kvferry_local.autoscale.signals import WorkerView
from kvferry_local.autoscale.target import CommandTarget, ComposeTarget, LocalTarget, ScaleTarget
from kvferry_local.client import Target, check, request_errors
from kvferry_local.settings import AutoscaleSettings
from kvferry_local.supervision import Role

TIMEOUT: Final = httpx.Timeout(5.0)

Views = dict[str, tuple[list[WorkerView], Targets]]  # by model: its workers, and the gateway's targets for it

log = get_logger(__name__)


def scale_target(settings: AutoscaleSettings) -> ScaleTarget:
    """Raises `SettingError`."""
    if settings.command and settings.target != "command":
        raise SettingError("--command", f"is for --target command, not {settings.target}")
    match settings.target:
        case "local":
            return LocalTarget(settings.run_file or default_run_file(os.environ, settings.cluster))
        case "compose":
            return ComposeTarget()
        case "command":
            return CommandTarget(settings.command)


class AutoscaleService:
    """Runs until it is stopped. What fails is told and tried again: the stack goes on as it is."""

    def __init__(self, settings: AutoscaleSettings, gateway: Target, target: ScaleTarget) -> None:
        self._settings = settings
        self._gateway = gateway
        self._target = target
        path = settings.scaling_file
        self._rules = PrefillScaling.read(path), DecodeScaling.read(path)
        self._autoscalers: dict[str, Autoscaler] = {}  # by model
        self._ordering: dict[tuple[str, Role], asyncio.Task[None]] = {}
        self._tasks = TaskSet(lambda name, error: log.error("not scaled", task=name, error=repr(error)))

    async def serve(self) -> None:
        settings = self._settings
        with stop_signals(asyncio.get_running_loop()) as stop:
            async with self._gateway.open_async(settings, TIMEOUT) as http:
                log.info("watching", gateway=self._gateway.url, target=settings.target, dry_run=settings.dry_run)
                try:
                    while not stop.is_set():
                        await self._look(http)
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(settings.interval):
                                await stop.wait()
                finally:
                    await self._tasks.cancel()

    async def _look(self, http: httpx.AsyncClient) -> None:
        try:
            with request_errors(self._gateway.url):
                response = await http.get("/v1/cluster")
            check(response)
            settings, target = self._settings, self._target
            found = chosen(parsed(response.json()), settings.served_model_name, several=target.tells_models_apart)
            for model, (workers, targets) in found.items():
                await self._judge(model, workers, targets)
        except KvferryError as error:
            log.warning("cannot see the cluster", error=str(error))
            for autoscaler in self._autoscalers.values():
                autoscaler.forget()

    async def _judge(self, model: str, workers: list[WorkerView], targets: Targets) -> None:
        """Raises `ScalingFailed`."""
        if model not in self._autoscalers:
            self._autoscalers[model] = Autoscaler(*self._rules)
        alive = Counter(worker.role for worker in workers if worker.state != "draining")
        replicas = await self._target.replicas(model, {role: alive[role] for role in SCALED})
        for role, advice in self._autoscalers[model].look(workers, targets, replicas, now()).items():
            if advice.replicas != replicas[role] and (model, role) not in self._ordering:
                self._order(model, role, advice, replicas[role])

    def _order(self, model: str, role: Role, advice: Advice, before: int) -> None:
        log.info(
            "scaling", model=model, role=role, before=before, replicas=advice.replicas, signals=repr(advice.signals)
        )
        if self._settings.dry_run:
            return
        task = self._tasks.spawn(self._target.scale(model, role, advice.replicas), f"scale {model} {role}")
        self._ordering[model, role] = task
        task.add_done_callback(lambda _: self._ordering.pop((model, role)))


def chosen(found: Views, wanted: str, *, several: bool) -> Views:
    """The models whose workers are scaled: `wanted`, else all. `several`: they may be more than one.

    Raises `KvferryError`.
    """
    if wanted and wanted not in found:
        raise KvferryError(f"--model: the gateway serves no {wanted!r}; there are: {', '.join(found)}")
    if not wanted and len(found) > 1 and not several:
        raise KvferryError(f"--model: this --target needs to know which of {', '.join(found)} is meant")
    return {wanted: found[wanted]} if wanted else found


def parsed(cluster: Mapping[str, Any]) -> Views:
    """`/v1/cluster` as decisions need it. Raises `KvferryError` for another form."""
    try:
        return {
            model: (
                [WorkerView.of(row) for row in cluster["workers"] if row["model"] == model and not row["unserved"]],
                Targets(ttft_s=placement["targets"]["ttft_s"], itl_s=placement["targets"]["itl_s"]),
            )
            for model, placement in cluster["gateway"]["placement"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KvferryError(f"/v1/cluster has another form than expected: {error!r}") from None
