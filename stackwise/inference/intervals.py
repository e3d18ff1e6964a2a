"""Estimates with their 95 % intervals."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

_UPPER = 0.975
_Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and between which two the truth lies 19 times of 20."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        """In a unit of which the old one has `factor` (above 0)."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def exponential(self) -> "Estimate":
        """Of it and of the ends of its interval."""
        return Estimate(math.exp(self.value), math.exp(self.low), math.exp(self.high))

    def named(self, name: str) -> dict[str, float]:
        """As metrics have it: `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def mean(values: NDArray[np.floating]) -> Estimate:
    """The mean of independent values `[n]`, with Student's t interval; of a single value the interval is a point."""
    return ratio(values, np.ones(len(values)))


def ratio(totals: NDArray[np.floating], counts: NDArray[np.floating]) -> Estimate:
    """`sum(totals) / sum(counts)` over independent samples, such as hits over tokens.

    The interval is that of the ratio estimator (Cochran 1977, Sampling Techniques, equation 6.13): tokens of one sample
    depend on each other, so samples are what is counted. With equal counts it is Student's interval of a mean.

    Args:
        totals: of each sample `[n]`.
        counts: of each sample `[n]`, above 0 in sum.
    """
    n, whole = len(totals), float(counts.sum())
    found = float(totals.sum()) / whole
    if n < 2:
        return Estimate(found, found, found)
    spread = math.sqrt(n / (n - 1) * float(np.square(totals - found * counts).sum())) / whole
    half = float(stdtrit(n - 1, _UPPER)) * spread
    return Estimate(found, found - half, found + half)


def proportion(hits: int, n: int) -> Estimate:
    """The share of hits in `n` independent trials, with Wilson's (1927) interval: it holds near 0 and 1, too."""
    share, z2 = hits / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))
