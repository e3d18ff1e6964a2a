"""Masks as a pure function of (seed, sample, variant)."""

from collections.abc import Sequence

import numpy as np

from stackwise.config.objective import ObjectiveParams

_STREAM = 0x6D61736B  # keeps these draws apart from others that use the same seed


def draw_masks(
    params: ObjectiveParams, *, seed: int, samples: np.ndarray, variants: np.ndarray, seq: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mask rates and masks of some (sample, variant) pairs.

    The variants of a sample are stratified: of M consecutive variants each takes its rate from another M-th of the
    range, M being `objective.variants`.

    Args:
        samples: sample ids `[n]`.
        variants: variant of each `[n]`.
        seq: tokens of a sample.

    Returns:
        Rates t `[n]` (float64) and masks `[n, seq]` (bool, True where the token is hidden).
    """
    rates, masks = np.empty(len(samples)), np.empty((len(samples), seq), dtype=bool)
    for i, (sample, variant) in enumerate(zip(samples.tolist(), variants.tolist(), strict=True)):
        cycle, place = divmod(variant, params.variants)
        # The offset is shared by a cycle's variants; the strata are visited from one that depends on the sample.
        shared = _generator(seed, sample, -1 - cycle)
        offset, start = shared.random(), int(shared.integers(params.variants))
        rates[i] = mask_rate(params, ((start + place) % params.variants + offset) / params.variants)
        masks[i] = draw_mask(_generator(seed, sample, variant), rates[i], seq, exact=params.count == "exact")
    return rates, masks


def mask_rate(params: ObjectiveParams, u: float) -> float:
    """The mask rate at quantile `u` in [0, 1) of the distribution that the parameters describe.

    `cosine` is the arc `cos(pi/2 (1 - u))` of MaskGIT (Chang et al. 2022), scaled to the range.
    """
    shaped = float(np.sin(0.5 * np.pi * u)) if params.distribution == "cosine" else u
    return params.mask_min + (params.mask_max - params.mask_min) * shaped


def draw_mask(generator: np.random.Generator, rate: float, seq: int, *, exact: bool) -> np.ndarray:
    """One mask `[seq]` (bool): each token with probability `rate`, or exactly `round(rate * seq)` tokens."""
    u = generator.random(seq)
    if not exact:
        return u < rate
    mask = np.zeros(seq, dtype=bool)
    mask[np.argsort(u, kind="stable")[: round(rate * seq)]] = True
    return mask


def _generator(seed: int, sample: int, variant: int) -> np.random.Generator:
    """A counter-based generator: any pair's draws without drawing those before it."""
    counter: Sequence[int] = (0, 0, sample, variant % 2**64)
    key = np.array([seed, _STREAM], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)))
