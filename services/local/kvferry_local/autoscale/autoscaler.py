"""From one look at the cluster to the replicas of both roles. Pure but for what it remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvferry.scaling import DecodeScaling, PrefillScaling
from kvferry_gateway.placement.targets import Targets
from kvferry_local.autoscale.decision import Patience, Signals, autoscale
from kvferry_local.autoscale.signals import Watch, WorkerView
from kvferry_local.supervision import Role

SCALED: Final[tuple[Role, ...]] = ("prefill", "decode")
DEFAULT_MAX_NUM_SEQS: Final = 64  # of a decode worker, where its file does not say


@dataclass(frozen=True, slots=True)
class Advice:
    """For one role."""

    replicas: int  # to have from now on
    asked: int  # by the present signals alone
    signals: Signals


class Autoscaler:
    def __init__(self, prefill: PrefillScaling, decode: DecodeScaling) -> None:
        self._rules = {"prefill": prefill.autoscale, "decode": decode.autoscale}
        self._max_num_seqs = int(decode.settings.get("max_num_seqs", DEFAULT_MAX_NUM_SEQS))
        self._watch = Watch()
        self._patience = {role: Patience(rules) for role, rules in self._rules.items()}

    def forget(self) -> None:
        """The cluster could not be seen: numbers asked for before that are no reason to act on the next one."""
        for patience in self._patience.values():
            patience.forget()

    def look(
        self, workers: Sequence[WorkerView], targets: Targets, replicas: Mapping[Role, int], now: float
    ) -> dict[Role, Advice]:
        """Advice for each role that can be judged. `replicas`: those ordered so far, still starting or not.

        A role without replicas is not this one's to start, and one without a ready worker says nothing.
        """
        signals = {
            "prefill": self._watch.prefill(workers, targets, now),
            "decode": self._watch.decode(workers, targets, self._max_num_seqs, now),
        }
        advice: dict[Role, Advice] = {}
        for role in SCALED:
            seen = signals[role]
            if seen is None or not replicas.get(role):
                self._patience[role].forget()
                continue
            asked = autoscale(seen, self._rules[role])
            advice[role] = Advice(self._patience[role].decide(asked, replicas[role], now), asked, seen)
        return advice
