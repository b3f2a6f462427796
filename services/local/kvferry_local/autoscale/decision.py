"""How many workers are wanted, and when that is acted upon. Pure.

Prefill is bound by compute: the work that arrives, and what waits, tell how many are wanted. Decode is bound by memory:
the tokens that are asked for, streams against the number that keeps a step within the ITL target, and KV blocks, tell.
Streams alone would not: with fewer workers each stream lasts longer, and there are more of them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from kvferry.scaling import AutoscaleRules, DecodeRules, PrefillRules


@dataclass(frozen=True, slots=True)
class PrefillSignals:
    """Of all prefill workers that are ready."""

    busy: float  # workers that compute, a mean over the latest half minute
    queued_s: float  # one worker's seconds for all prompts that wait
    growth: float  # seconds of work that the queues grew by in each second of that time; above 0: overload
    wait_s: float  # of the next prompt, before it is computed: its predicted TTFT without its own compute
    ttft_s: float  # the gateways' target


@dataclass(frozen=True, slots=True)
class DecodeSignals:
    """Of all decode workers."""

    streams: float  # that decode, or wait to
    tokens_per_s: float  # that all workers give, a mean over the latest half minute
    step_base_s: float  # seconds of a step without sequences
    step_slope_s: float  # that one sequence adds
    used_blocks: float
    blocks_per_worker: float
    itl_s: float  # the gateways' target
    max_num_seqs: int  # that one worker decodes at once


Signals = PrefillSignals | DecodeSignals


def autoscale(signals: Signals, rules: AutoscaleRules) -> int:
    """Replicas that these signals ask for, within the rules' bounds."""
    match signals, rules:
        case PrefillSignals(), PrefillRules():
            arriving = signals.busy + max(0.0, signals.growth)
            asked = [arriving / rules.utilisation]
            if signals.wait_s > rules.ttft_share * signals.ttft_s:
                asked.append(arriving + signals.queued_s / rules.clear_s)
        case DecodeSignals(), DecodeRules():
            step_s = rules.itl_share * signals.itl_s
            # A step that is too long for one stream alone is not made shorter by more workers than streams.
            streams = max(1.0, (step_s - signals.step_base_s) / max(signals.step_slope_s, 1e-9))
            streams = min(streams, signals.max_num_seqs)
            asked = [signals.streams / streams, signals.tokens_per_s / (rules.tokens_per_s or streams / step_s)]
            if signals.blocks_per_worker:
                asked.append(signals.used_blocks / (rules.kv_use * signals.blocks_per_worker))
        case _:
            raise TypeError(f"{type(rules).__name__} are no rules for {type(signals).__name__}")
    return bounded(math.ceil(max(asked) - 1e-9), rules)


def bounded(replicas: int, rules: AutoscaleRules) -> int:
    return min(max(replicas, rules.min_replicas), rules.max_replicas)


class Patience:
    """Acts on a number only when it has been asked for long enough, so that a burst or a lull moves nothing.

    Up to the least that was asked for during `up_after_s`, down to the most that was during `down_after_s`: the
    stabilisation windows of Kubernetes' HorizontalPodAutoscaler.
    """

    def __init__(self, rules: AutoscaleRules) -> None:
        self._rules = rules
        self._asked: deque[tuple[float, int]] = deque()
        self._since: float | None = None  # of the first number in a row

    def forget(self) -> None:
        """Nothing is known for a while: what was asked before it does not count."""
        self._asked.clear()
        self._since = None

    def decide(self, asked: int, replicas: int, now: float) -> int:
        """The number of replicas to have from now on, where there are `replicas`."""
        rules = self._rules
        self._since = now if self._since is None else self._since
        self._asked.append((now, asked))
        while self._asked[0][0] < now - max(rules.up_after_s, rules.down_after_s):
            self._asked.popleft()
        lately = [number for at, number in self._asked if at >= now - rules.up_after_s]
        if now - self._since >= rules.up_after_s and (least := min(lately)) > replicas:
            return bounded(least, rules)
        for_long = [number for at, number in self._asked if at >= now - rules.down_after_s]
        if now - self._since >= rules.down_after_s and (most := max(for_long)) < replicas:
            return bounded(most, rules)
        return bounded(replicas, rules)
