"""The placement simulation's cluster with workers that come and go as `kvferry autoscale` decides.

A worker that is added takes `STARTUP_S` until it is ready and is paid for from the start; one that is drained takes
nothing new, finishes what it has, and is paid for until then.
"""

from __future__ import annotations

from typing import Any, Final

from bench.placement_cluster import Cluster, Outcome
from bench.placement_engine import EngineRates
from bench.traces import TraceRequest
from kvferry.scaling import DecodeScaling, PrefillScaling
from kvferry_gateway.placement.targets import Targets
from kvferry_local.autoscale.autoscaler import SCALED, Autoscaler
from kvferry_local.autoscale.signals import WorkerView
from kvferry_local.supervision import Role

LOOK_S: Final = 1.0
STARTUP_S: Final = 20.0  # from the order to the first request: a process, its imports, a model of some GB


class ElasticCluster(Cluster):
    """`run` once."""

    def __init__(
        self, prefill: PrefillScaling, decode: DecodeScaling, rates: EngineRates, targets: Targets, seed: int
    ) -> None:
        super().__init__("ours", prefill.replicas, decode.replicas, rates, targets, seed)
        self._targets = targets
        self._autoscaler = Autoscaler(prefill, decode)
        self._starting: dict[Role, int] = dict.fromkeys(SCALED, 0)
        self._paid_from = {worker.incarnation: 0.0 for role in SCALED for worker in self._workers(role)}
        self._role_of: dict[int, Role] = {w.incarnation: role for role in SCALED for w in self._workers(role)}
        self.worker_s: dict[Role, float] = dict.fromkeys(SCALED, 0.0)
        self.replicas: list[tuple[float, int, int]] = []  # (time, prefill, decode), at each change
        self.num_ended_early = 0  # workers that ended with something left to do: always 0

    def run(self, requests: list[TraceRequest]) -> Outcome:
        self.replicas.append((0.0, *self._all_ordered()))
        self._schedule(LOOK_S, self._look)
        outcome = super().run(requests)
        for incarnation in self._paid_from:
            self._pay(incarnation, self.now)
        for role in SCALED:
            self.worker_s[role] += self._starting[role] * STARTUP_S
        return outcome

    def _workers(self, role: Role) -> list[Any]:
        return list((self._prefills if role == "prefill" else self._decodes).values())

    def _ordered(self, role: Role) -> int:
        ready = [worker for worker in self._workers(role) if worker.incarnation not in self._draining]
        return len(ready) + self._starting[role]

    def _all_ordered(self) -> tuple[int, int]:
        return self._ordered("prefill"), self._ordered("decode")

    def _look(self, now: float) -> None:
        replicas = {role: self._ordered(role) for role in SCALED}
        views = [self._view(worker, role, now) for role in SCALED for worker in self._workers(role)]
        for role, advice in self._autoscaler.look(views, self._targets, replicas, now).items():
            for _ in range(advice.replicas - replicas[role]):
                self._order(role, now)
            for worker in self._least_loaded(role)[: max(0, replicas[role] - advice.replicas)]:
                self._drain(worker, now)
        after = self._all_ordered()
        if after != (replicas["prefill"], replicas["decode"]):
            self.replicas.append((now, *after))
        self._schedule(now + LOOK_S, self._look)

    def _view(self, worker: Any, role: Role, now: float) -> WorkerView:
        load = worker.load(now)
        state = "draining" if worker.incarnation in self._draining else "ready"
        return WorkerView(
            f"{role}-{worker.incarnation}", role, state, self._rates.num_blocks, load.free_blocks, load.num_waiting,
            load.num_running, load.waiting_tokens, load.prefill_tokens_per_s, load.decode_step_s,
        )  # fmt: skip

    def _least_loaded(self, role: Role) -> list[Any]:
        ready = [worker for worker in self._workers(role) if worker.incarnation not in self._draining]
        return sorted(ready, key=lambda worker: self._accepted[worker.incarnation])

    def _order(self, role: Role, now: float) -> None:
        self._starting[role] += 1

        def begin(at: float) -> None:
            self._starting[role] -= 1
            worker = self._introduce(role)
            self._paid_from[worker.incarnation], self._role_of[worker.incarnation] = at - STARTUP_S, role
            self._beating(worker)(at)

        self._schedule(now + STARTUP_S, begin)

    def _drain(self, worker: Any, now: float) -> None:
        self._draining.add(worker.incarnation)
        self._beat(worker, now)
        self._end_if_drained(worker.incarnation, now)

    def _finished_with(self, incarnation: int, now: float) -> None:
        super()._finished_with(incarnation, now)
        if incarnation in self._draining:
            # When the worker itself has done with this moment.
            self._schedule(now, lambda at: self._end_if_drained(incarnation, at))

    def _end_if_drained(self, incarnation: int, now: float) -> None:
        if self._accepted[incarnation] or incarnation not in self._paid_from:
            return
        workers: dict[int, Any] = self._prefills if self._role_of[incarnation] == "prefill" else self._decodes
        worker = workers.pop(incarnation)
        load = worker.load(now)
        self.num_ended_early += bool(load.num_running or load.num_waiting or load.waiting_tokens)
        for gateway in self._gateways:
            gateway.snapshot.roster.remove(incarnation)
        self._index.detach(incarnation)
        self._pay(incarnation, now)
        del self._paid_from[incarnation]

    def _pay(self, incarnation: int, until: float) -> None:
        self.worker_s[self._role_of[incarnation]] += until - self._paid_from[incarnation]
