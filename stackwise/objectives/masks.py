"""Mask rates and masks as a pure function of (seed, sample, variant)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise.config.objective import ObjectiveParams
from stackwise.objectives.draws import generator
from stackwise.objectives.schedules import Curriculum, TimeStepMasking

_STREAM = 0x6D61736B  # keeps these draws apart from others that use the same seed
_GROUPS = 0x67726F75


@dataclass(frozen=True, eq=False)
class MaskRates:
    """The mask rate t of each (sample, variant): drawn, unless a fraction or a curriculum sets it."""

    params: ObjectiveParams
    seed: int
    fraction: float | None = None
    """The one that all have: where each stack owns a time, or a schedule runs over depth."""
    curriculum: Curriculum | None = None
    groups: NDArray[np.int64] | None = None
    """Number of the group that each sample belongs to `[samples]`: the samples of a group share t."""

    def __call__(self, samples: np.ndarray, variants: np.ndarray) -> NDArray[np.float64]:
        """The rates of some (sample, variant) pairs, two `[n]`: `[n]`."""
        if self.curriculum is not None:
            return self.curriculum.fractions(samples, variants)
        if self.fraction is not None:
            return np.full(len(samples), self.fraction)
        return np.array([self.at(u) for u in self.quantiles(samples, variants).tolist()])

    def at(self, u: float) -> float:
        """The rate at quantile `u` in [0, 1)."""
        return mask_rate(self.params, u) if self.fraction is None else self.fraction

    def quantiles(self, samples: np.ndarray, variants: np.ndarray) -> NDArray[np.float64]:
        """Where in the distribution of rates each (sample, variant) lies, `[n]` in [0, 1).

        The variants of a sample are stratified: of M consecutive variants each lies in another M-th of the range, M
        being `objective.variants`.
        """
        found, strata = np.empty(len(samples)), self.params.variants
        stream, owners = (_STREAM, samples) if self.groups is None else (_GROUPS, self.groups[samples])
        for i, (owner, variant) in enumerate(zip(owners.tolist(), variants.tolist(), strict=True)):
            cycle, place = divmod(variant, strata)
            # The offset is shared by a cycle's variants; the strata are visited from one that depends on the sample.
            shared = generator(self.seed, stream, owner, -1 - cycle)
            offset, start = shared.random(), int(shared.integers(strata))
            found[i] = ((start + place) % strata + offset) / strata
        return found

    def identity(self) -> dict[str, Any]:
        """What determines the rates, besides the seed and the number of variants, as JSON values."""
        if self.curriculum is not None:
            return {"curriculum": self.curriculum.identity()}
        if self.fraction is not None:
            return {"fraction": self.fraction}
        keys = {"mask_min", "mask_max", "distribution", "num_time_steps", "time_step_fractions"}
        size = None if self.groups is None else int(np.bincount(self.groups).max())
        return {**self.params.model_dump(include=keys), "group": size}


def draw_masks(
    params: ObjectiveParams,
    *,
    seed: int,
    samples: np.ndarray,
    variants: np.ndarray,
    seq: int,
    rates: MaskRates | None = None,
    words: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Mask rates and masks of some (sample, variant) pairs, fresh ones for each pair.

    Args:
        params: the section `objective`.
        seed: of the pipeline.
        samples: sample ids `[n]`.
        variants: variant of each `[n]`.
        seq: tokens of a sample.
        rates: of the pairs (None: drawn as the parameters say).
        words: numbers of the words `[n, seq]`, if whole words are masked.

    Returns:
        Rates t `[n]` (float64) and masks `[n, seq]` (bool, True where the token is hidden).
    """
    of_pairs = (rates or MaskRates(params, seed))(samples, variants)
    masks = np.empty((len(samples), seq), dtype=bool)
    for i, (sample, variant) in enumerate(zip(samples.tolist(), variants.tolist(), strict=True)):
        draws = generator(seed, _STREAM, sample, variant)
        own = None if words is None else words[i]
        masks[i] = draw_mask(draws, of_pairs[i], seq, exact=params.count == "exact", words=own)
    return of_pairs, masks


def mask_rate(params: ObjectiveParams, u: float) -> float:
    """The mask rate at quantile `u` in [0, 1) of the distribution that the parameters describe.

    `cosine` is the arc `cos(pi/2 (1 - u))` of MaskGIT (Chang et al. 2022), scaled to the range or the time steps.
    """
    shaped = float(np.sin(0.5 * np.pi * u)) if params.distribution == "cosine" else u
    if params.num_time_steps is None:
        return params.mask_min + (params.mask_max - params.mask_min) * shaped
    steps = TimeStepMasking(
        params.num_time_steps, params.time_step_fractions, minimum=params.mask_min, maximum=params.mask_max
    )
    return steps.fraction(steps.step_at(shaped))


def draw_mask(
    draws: np.random.Generator,
    rate: float,
    seq: int,
    *,
    exact: bool,
    words: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """One mask: each token or word with probability `rate`, or exactly `round(rate * seq)` tokens.

    Whole words cannot cover any number of tokens exactly: in random order, as many are masked as bring the number of
    tokens nearest to it.

    Args:
        draws: random numbers.
        rate: t.
        seq: tokens of the sample.
        exact: whether the number of tokens is fixed.
        words: number of each token's word `[seq]`, from 0, if whole words are masked.

    Returns:
        `[seq]` (bool).
    """
    u = draws.random(seq)
    if words is not None:
        lengths = np.bincount(words)
        return _draw_words(u[: len(lengths)], rate, lengths, exact=exact)[words]
    if not exact:
        return u < rate
    mask = np.zeros(seq, dtype=bool)
    mask[np.argsort(u, kind="stable")[: round(rate * seq)]] = True
    return mask


def _draw_words(u: NDArray[np.float64], rate: float, lengths: NDArray[np.int64], *, exact: bool) -> NDArray[np.bool_]:
    """Which words of the given lengths are masked, `[words]`."""
    if not exact:
        return u < rate
    order = np.argsort(u, kind="stable")
    covered = np.concatenate(([0], np.cumsum(lengths[order])))
    masked = np.zeros(len(u), dtype=bool)
    masked[order[: int(np.argmin(np.abs(covered - round(rate * int(lengths.sum())))))]] = True
    return masked
