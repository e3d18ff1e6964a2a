"""Objectives: what a model sees of a sample, and which tokens it must predict."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stackwise.config.objective import ObjectiveParams
from stackwise.objectives.masks import draw_masks


@dataclass
class Targets:
    """The tokens that a batch asks for. `rows` are positions in the flattened batch: `sample * seq + position`."""

    rows: Tensor
    """`[n]` int64."""
    tokens: Tensor
    """`[n]` int64: the token to predict at each row."""
    weights: Tensor
    """`[n]` fp32: what each token's cross-entropy counts."""
    batch_tokens: int
    """batch * seq: the loss is the weighted sum over the rows divided by this."""

    def to(self, device: torch.device) -> "Targets":
        """The same on another device."""
        return Targets(
            self.rows.to(device, non_blocking=True),
            self.tokens.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            self.batch_tokens,
        )


class Objective(Protocol):
    """What is predicted from what."""

    @property
    def causal(self) -> bool:
        """Whether attention may only look back."""

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> tuple[np.ndarray, Targets]:
        """From token ids `[batch, seq]`, sample ids `[batch]` and mask variants `[batch]`: the ids that the model sees
        `[batch, seq]` and the targets."""
        ...


@dataclass(frozen=True)
class MaskDiffusionObjective:
    """Mask-diffusion (Sahoo et al. 2024; Shi et al. 2024): hide a random share t of the tokens and predict them.

    Weights are 1 (`plain`) or 1/t (`nelbo`, equation 10 of Sahoo et al. for the linear schedule).
    """

    params: ObjectiveParams
    seed: int
    mask_id: int
    causal: bool = False

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> tuple[np.ndarray, Targets]:
        """As `Objective` says; what is hidden shows the mask token."""
        rates, mask = draw_masks(self.params, seed=self.seed, samples=samples, variants=variants, seq=tokens.shape[1])
        weights = np.ones_like(rates) if self.params.weighting == "plain" else 1.0 / rates
        return np.where(mask, self.mask_id, tokens), masked_targets(tokens, mask, weights)


@dataclass(frozen=True)
class CausalObjective:
    """Next-token prediction; the last position of a sample has no next token."""

    causal: bool = True

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> tuple[np.ndarray, Targets]:
        """As `Objective` says; the model sees all tokens, and variants make no difference."""
        has_next = np.ones(tokens.shape, dtype=bool)
        has_next[:, -1] = False
        following = np.roll(tokens, -1, axis=1)
        return tokens, masked_targets(following, has_next, np.ones(len(tokens)))


def masked_targets(tokens: np.ndarray, mask: np.ndarray, weights: np.ndarray) -> Targets:
    """The targets of a mask.

    Args:
        tokens: what to predict `[batch, seq]`.
        mask: where `[batch, seq]` (bool).
        weights: of each sample's tokens `[batch]`.
    """
    rows = np.flatnonzero(mask)
    return Targets(
        torch.from_numpy(rows),
        torch.from_numpy(tokens.reshape(-1)[rows]),
        torch.from_numpy(np.repeat(weights, mask.sum(axis=1)).astype(np.float32)),
        tokens.size,
    )
