"""What the gateway learns online: rates of links, how a decode step grows, how wrong its forecasts are. Pure."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

MAX_LINKS: Final = 1 << 16  # pairs whose transfer rate is remembered, the latest used
MIN_SIGMA: Final = 0.05  # no forecast is trusted to better than 5 %
MAX_RATIO: Final = 1e6  # of forecast and target: beyond it there is no chance, nor an overflow
# The logistic curve nearest to the normal distribution's: off by 0.01 at most.
_LOGISTIC: Final = 1.702


class Ewma:
    """Mean and variance that forget: an observation of `weight` w leaves the older ones exp(-w / memory) of theirs."""

    __slots__ = ("_memory", "_weight", "mean", "variance")

    def __init__(self, memory: float, mean: float = 0.0, variance: float = 0.0) -> None:
        self._memory = memory
        self._weight = 0.0
        self.mean = mean  # a first guess until something is observed
        self.variance = variance

    @property
    def known(self) -> bool:
        return self._weight > 0.0

    def observe(self, value: float, weight: float = 1.0) -> None:
        if weight <= 0.0 or not math.isfinite(value):
            return
        kept = self._weight * math.exp(-weight / self._memory)
        self._weight = kept + weight
        share = weight / self._weight
        if kept == 0.0:
            self.mean = value
            return
        delta = value - self.mean
        self.mean += share * delta
        self.variance = (1.0 - share) * (self.variance + share * delta * delta)


class StepLine:
    """Seconds of a decode step = base + slope * sequences in it, by least squares over the latest observations.

    With one batch size seen there is no slope to fit: half of the step is then taken for its fixed part, as
    weights are read once and KV for each sequence.
    """

    __slots__ = ("_kept", "_n", "_x", "_xx", "_xy", "_y")

    def __init__(self, memory: float = 64.0) -> None:
        self._kept = math.exp(-1.0 / memory)
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, sequences: float, seconds: float) -> None:
        if sequences <= 0 or seconds <= 0 or not math.isfinite(seconds):
            return
        kept = self._kept
        self._n = self._n * kept + 1.0
        self._x = self._x * kept + sequences
        self._y = self._y * kept + seconds
        self._xx = self._xx * kept + sequences * sequences
        self._xy = self._xy * kept + sequences * seconds

    def fit(self) -> tuple[float, float] | None:
        """(base, slope), neither negative; None before the first observation."""
        if self._n == 0.0:
            return None
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        if spread < 0.05 * mean_x:
            return 0.5 * mean_y, 0.5 * mean_y / mean_x
        slope = (self._xy / self._n - mean_x * mean_y) / spread
        slope = min(max(0.0, slope), mean_y / mean_x)
        return mean_y - slope * mean_x, slope


class LinkRates:
    """KV bytes a second from each prefill worker to each decode worker; one never used is taken for the average."""

    def __init__(self, nominal_bytes_per_s: float, memory_bytes: float = 256e6) -> None:
        self._memory = memory_bytes
        self._all = Ewma(4 * memory_bytes, nominal_bytes_per_s)
        # By prefill and decode incarnation; the prefill worker least lately heard of first.
        self._links: dict[int, dict[int, Ewma]] = {}
        self._num_links = 0

    @property
    def average(self) -> float:
        return self._all.mean

    def __len__(self) -> int:
        return self._num_links

    def observe(self, prefill: int, decode: int, num_bytes: float, seconds: float) -> None:
        if num_bytes <= 0 or seconds <= 0:
            return
        links = self._links.pop(prefill, None) or {}
        self._links[prefill] = links
        if decode not in links:
            links[decode] = Ewma(self._memory)
            self._num_links += 1
        links[decode].observe(num_bytes / seconds, num_bytes)
        self._all.observe(num_bytes / seconds, num_bytes)
        while self._num_links > MAX_LINKS and len(self._links) > 1:
            self.forget(next(iter(self._links)))

    def forget(self, incarnation: int) -> None:
        """The worker is gone, or is the one that may be forgotten."""
        self._num_links -= len(self._links.pop(incarnation, ()))
        for links in self._links.values():
            if links.pop(incarnation, None) is not None:
                self._num_links -= 1

    def matrix(self, prefills: list[int], decodes: list[int]) -> FloatArray:
        """Bytes a second, [prefills, decodes]."""
        rates = np.full((len(prefills), len(decodes)), self._all.mean)
        for row, prefill in enumerate(prefills):
            if links := self._links.get(prefill):
                for column, decode in enumerate(decodes):
                    if (link := links.get(decode)) is not None:
                        rates[row, column] = link.mean
        return rates


class ForecastError:
    """How a forecast's logarithm is off: actual = forecast * exp(bias + sigma * standard normal)."""

    def __init__(self, sigma: float, memory: float = 200.0) -> None:
        self._log_ratio = Ewma(memory, 0.0, sigma * sigma)

    @property
    def bias(self) -> float:
        return self._log_ratio.mean

    @property
    def sigma(self) -> float:
        return max(MIN_SIGMA, math.sqrt(self._log_ratio.variance))

    def observe(self, forecast: float, actual: float) -> None:
        if forecast > 0 and actual > 0:
            # One stall of minutes says little about the next request: it must not drown what was learned.
            self._log_ratio.observe(min(3.0, max(-3.0, math.log(actual / forecast))))

    def chance(self, forecast: FloatArray, target: float) -> FloatArray:
        """Probability that the actual value stays within `target`, in the shape of `forecast`."""
        # The logistic of a multiple of log(target / forecast) is a power of their ratio: no exp, no log.
        sharpness = _LOGISTIC / self.sigma
        ratio = forecast * (math.exp(self.bias) / target)
        return np.asarray(1.0 / (1.0 + np.minimum(ratio, MAX_RATIO) ** sharpness))
