"""How many tokens of a batch the loss asks for: the masks are random, their number has an expectation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stackwise.config.objective import MASKED, ObjectiveParams
from stackwise.objectives.masks import mask_rate
from stackwise.objectives.schedules import MaskScheduler

_POINTS = 1024
_DEVIATIONS = 4


@dataclass(frozen=True)
class Rows:
    """Target rows of a batch."""

    mean: float
    most: int
    """More than any batch is likely to have: the mean and four standard deviations."""


def rows_of(
    objective: ObjectiveParams, *, batch: int, seq: int, fraction: float | None = None, shared: bool = False
) -> Rows:
    """The rows of batches over a training. Where the labels come with the data, all tokens.

    Args:
        objective: the section `objective`.
        batch: samples.
        seq: tokens of a sample.
        fraction: the mask rate, where there is one for all.
        shared: whether the samples of a batch have the same mask rate (`model.time.sampling: batch`).
    """
    tokens = batch * seq
    if objective.type not in MASKED:
        known = tokens - batch if objective.type == "clm" else tokens
        return Rows(known, known)
    rates = _rates(objective, fraction)
    mean = _mean(rates)
    if objective.by_training and fraction is None:  # of the steps with the highest rate
        rates = [max(rates)]
    spread = tokens * seq * _mean([(t - _mean(rates)) ** 2 for t in rates]) * (batch if shared else 1)
    if objective.count == "bernoulli":
        spread += tokens * _mean([t * (1 - t) for t in rates])
    most = min(tokens * _mean(rates) + _DEVIATIONS * math.sqrt(spread), tokens)
    return Rows(tokens * mean, math.ceil(most))


def _rates(objective: ObjectiveParams, fraction: float | None) -> list[float]:
    """Mask rates that are equally likely."""
    if fraction is not None:
        return [fraction]
    places = [(i + 0.5) / _POINTS for i in range(_POINTS)]
    if objective.by_training:
        assert objective.schedule is not None
        return list(map(MaskScheduler(objective.schedule, objective.mask_min, objective.mask_max).fraction, places))
    return [mask_rate(objective, u) for u in places]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
