"""What models are asked about held-out text: the same samples under the same masks, whatever the model."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise.objectives.masks import draw_mask
from stackwise.objectives.targets import NO_TARGET, Labels, Task, masked_targets


def spread(n: int, count: int) -> NDArray[np.int64]:
    """`count` of `n` samples, spread evenly (all, if there are fewer): `[min(n, count)]`."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(np.int64)


@dataclass(frozen=True)
class BoundObjective:
    """The negative evidence lower bound over mask rates (0, 1].

    Of a sample's seq tokens n are masked, n uniform on 1 ... seq, and the mean cross-entropy of the masked is its
    expectation: the form of the bound with the least variance (Ou et al. 2024, equation 3.5; Nie et al. 2025,
    equation 6). Here a variant is the number of a draw; the n of consecutive draws form a low-discrepancy sequence.
    Weights are seq / n, with which `target_loss` is the mean over the samples (nats per token).
    """

    seed: int
    mask_id: int
    causal: bool = False
    variants: int = 1

    def identity(self) -> dict[str, Any]:
        """As `Objective` says."""
        return {"seed": self.seed, "bound": True}

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """As `Objective` says."""
        seq = tokens.shape[1]
        phase = (variants * ((math.sqrt(5) - 1) / 2) + 0.5) % 1.0
        masked = 1 + np.minimum((phase * seq).astype(int), seq - 1)
        return masked_task(tokens, masked / seq, variants, seed=self.seed, mask_id=self.mask_id)


@dataclass(frozen=True)
class CompletionBoundObjective:
    """The bound of `BoundObjective` on the tokens that have a label, given all others, which are never hidden.

    Of a sample's L such tokens n are masked, n uniform on 1 ... L. Weights are L / n, scaled so that `target_loss` is
    the mean over the labelled tokens of the batch (nats per token).
    """

    source: Labels
    seed: int
    mask_id: int
    causal: bool = False
    variants: int = 1

    def identity(self) -> dict[str, Any]:
        """As `Objective` says."""
        return {"seed": self.seed, "bound": True}

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """As `Objective` says; the rate of a sample is the share of its labelled tokens that is masked."""
        candidates = self.source.labels(samples) != NO_TARGET
        counts = candidates.sum(axis=1)
        phase = (variants * ((math.sqrt(5) - 1) / 2) + 0.5) % 1.0
        masked = np.minimum(1 + (phase * counts).astype(int), counts)
        mask = np.zeros(tokens.shape, dtype=bool)
        for i, (n, draw) in enumerate(zip(masked.tolist(), variants.tolist(), strict=True)):
            order = np.random.default_rng([self.seed, draw % 2**32]).permutation(np.flatnonzero(candidates[i]))
            mask[i, order[:n]] = True
        weights = counts / np.maximum(1, masked) * (tokens.size / max(1, counts.sum()))
        inputs = np.where(mask, self.mask_id, tokens)
        return Task(inputs, masked_targets(tokens, mask, weights), masked / np.maximum(1, counts))


def masked_task(tokens: np.ndarray, rates: np.ndarray, draws: np.ndarray, *, seed: int, mask_id: int) -> Task:
    """The task of predicting exactly `max(1, round(rate * seq))` masked tokens of each sample.

    Args:
        tokens: `[batch, seq]`.
        rates: mask rate of each sample `[batch]`.
        draws: number of the draw that masks it `[batch]`.
        seed: of the pipeline.
        mask_id: id of the mask token.
    """
    seq = tokens.shape[1]
    mask = np.stack(
        [
            draw_mask(np.random.default_rng([seed, draw % 2**32]), max(rate, 1 / seq), seq, exact=True)
            for rate, draw in zip(rates.tolist(), draws.tolist(), strict=True)
        ]
    )
    counts = mask.sum(axis=1)
    return Task(np.where(mask, mask_id, tokens), masked_targets(tokens, mask, seq / counts), counts / seq)
