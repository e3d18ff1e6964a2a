"""Objectives: what a model sees of a sample, and which tokens it must predict."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.objective import ObjectiveParams
from stackwise.objectives.corruption import corrupt
from stackwise.objectives.fixed import FixedMaskAssigner
from stackwise.objectives.masks import MaskRates, draw_masks
from stackwise.objectives.words import Words

NO_TARGET = -100
"""The label of a position that asks for nothing, as Hugging Face's models have it."""


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
    embedding_weight: float = 0.0
    """Weight of the denoising term in embedding space (`embedding_loss`)."""

    def to(self, device: torch.device) -> "Targets":
        """The same on another device."""
        return replace(
            self,
            rows=self.rows.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
        )


@dataclass
class Task:
    """What a model sees of some samples, and what it must make of it."""

    inputs: np.ndarray
    """Token ids `[batch, seq]`; the mask token where something is hidden."""
    targets: Targets
    times: np.ndarray
    """The mask rate t of each sample `[batch]`; 0 without masks."""


class Objective(Protocol):
    """What is predicted from what."""

    @property
    def causal(self) -> bool:
        """Whether attention may only look back."""

    @property
    def variants(self) -> int:
        """How many variants of a sample differ, where they are kept: M."""

    def identity(self) -> dict[str, Any]:
        """What determines the inputs that it makes of tokens, and who sees whom, as JSON values; not the weights."""

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """The task that token ids `[batch, seq]` of the samples `[batch]` make under the mask variants `[batch]`."""
        ...


@dataclass(frozen=True)
class MaskDiffusionObjective:
    """Mask-diffusion (Sahoo et al. 2024; Shi et al. 2024): hide a random share t of the tokens and predict them.

    Weights are 1 (`plain`) or 1/t (`nelbo`, equation 10 of Sahoo et al. for the linear schedule). With type `mlm` it is
    masked language modelling (Devlin et al. 2019): the loss of a batch is the mean over its masked tokens, and with
    `random_share` and `keep_share` some of them show another token or themselves.
    """

    params: ObjectiveParams
    seed: int
    mask_id: int
    causal: bool = False
    rates: MaskRates | None = None
    """The mask rates (None: drawn as the parameters say)."""
    words: Words | None = None
    """Needed where whole words are masked."""
    only: "Labels | None" = None
    """Where tokens come with labels: only those that have one are ever hidden, so a prompt is always seen whole, and
    the loss is the mean over them (Nie et al. 2025, LLaDA, supervised fine-tuning)."""

    @property
    def variants(self) -> int:
        """As `Objective` says."""
        return self.params.variants

    def identity(self) -> dict[str, Any]:
        """As `Objective` says."""
        rates = self.rates or MaskRates(self.params, self.seed)
        keys = {"count", "unit", "pool_size", "variants", "random_share", "keep_share"}
        return {"seed": self.seed, "rates": rates.identity(), **self.params.model_dump(include=keys)}

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """As `Objective` says; what is hidden shows the mask token."""
        params, seq = self.params, tokens.shape[1]
        words = None
        if params.unit == "word":
            assert self.words is not None, "whole words need the table of their beginnings"
            words = self.words.of(tokens)
        if params.masks == "fresh":
            rates, mask = draw_masks(
                params, seed=self.seed, samples=samples, variants=variants, seq=seq, rates=self.rates, words=words
            )
        else:
            if seq not in self._assigners:
                self._assigners[seq] = FixedMaskAssigner(params, seed=self.seed, seq=seq, rates=self.rates)
            rates, mask = self._assigners[seq](samples, variants, words)
            variants = variants % params.variants
        share = 1.0
        if self.only is not None:
            candidates = self.only.labels(samples) != NO_TARGET
            mask, share = mask & candidates, candidates.mean()
        inputs = corrupt(
            tokens,
            mask,
            mask_id=self.mask_id,
            random_share=params.random_share,
            keep_share=params.keep_share,
            seed=self.seed,
            samples=samples,
            variants=variants,
        )
        weights = np.ones_like(rates) if params.weighting == "plain" else 1.0 / rates
        if params.type == "mlm":  # a mean over the masked tokens; diffusion sums them over the share of all tokens
            weights *= mask.size / max(1, mask.sum())
        elif self.only is not None:
            weights /= max(share, 1 / mask.size)
        targets = masked_targets(tokens, mask, weights)
        return Task(inputs, replace(targets, embedding_weight=params.embedding_weight), rates)

    @cached_property
    def _assigners(self) -> dict[int, FixedMaskAssigner]:
        """Of masks that stay, by the tokens of a sample."""
        return {}


@dataclass(frozen=True)
class CausalObjective:
    """Next-token prediction; the last position of a sample has no next token."""

    causal: bool = True
    variants: int = 1

    def identity(self) -> dict[str, Any]:
        """As `Objective` says."""
        return {"causal": True}

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """As `Objective` says; the model sees all tokens, and variants make no difference."""
        has_next = np.ones(tokens.shape, dtype=bool)
        has_next[:, -1] = False
        following = np.roll(tokens, -1, axis=1)
        return Task(tokens, masked_targets(following, has_next, np.ones(len(tokens))), np.zeros(len(tokens)))


class Labels(Protocol):
    """Where the targets of samples come from."""

    def labels(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Of the samples `indices` `[n]`: `[n, seq]`, `NO_TARGET` where nothing is asked for."""
        ...


class PackedLabels(Labels, Protocol):
    """Likewise, of samples that hold rows that do not see each other."""

    def segments(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The number of each position's row `[n, seq]`."""
        ...


@dataclass(frozen=True)
class CompletionObjective:
    """Next-token prediction of the tokens that have a label, each from what stands before it in its own row.

    The loss is the mean over them. The first token of a row is predicted by nobody.
    """

    source: PackedLabels
    causal: bool = True
    variants: int = 1

    def identity(self) -> dict[str, Any]:
        """As `Objective` says."""
        return {"causal": True}

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """As `Objective` says; the model sees all tokens, and variants make no difference."""
        labels, segments = self.source.labels(samples), self.source.segments(samples)
        following = np.full_like(labels, NO_TARGET)
        following[:, :-1] = np.where(segments[:, 1:] == segments[:, :-1], labels[:, 1:], NO_TARGET)
        return Task(tokens, mean_targets(following), np.zeros(len(tokens)))


@dataclass(frozen=True)
class ClassesObjective:
    """The class of each position that has one, read in both directions; the loss is the mean over these positions."""

    source: Labels
    causal: bool = False
    variants: int = 1

    def identity(self) -> dict[str, Any]:
        """As `Objective` says."""
        return {"causal": False}

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """As `Objective` says; the model sees all tokens, and variants make no difference."""
        return Task(tokens, mean_targets(self.source.labels(samples)), np.zeros(len(tokens)))


@dataclass(frozen=True)
class CustomObjective:
    """Targets that come with the data: the label of each position, none where it is `NO_TARGET`.

    Labels stand at the positions that predict them: next-token labels come shifted.
    """

    source: Labels
    causal: bool
    variants: int = 1

    def identity(self) -> dict[str, Any]:
        """As `Objective` says."""
        return {"causal": self.causal}

    def __call__(self, tokens: np.ndarray, samples: np.ndarray, variants: np.ndarray) -> Task:
        """As `Objective` says; the model sees all tokens, and variants make no difference."""
        labels = self.source.labels(samples)
        targets = masked_targets(labels, labels != NO_TARGET, np.ones(len(tokens)))
        return Task(tokens, targets, np.zeros(len(tokens)))


def mean_targets(labels: NDArray[np.int64]) -> Targets:
    """Targets whose loss is the mean over all that there are.

    Args:
        labels: `[batch, seq]`, `NO_TARGET` where there is none.
    """
    wanted = labels != NO_TARGET
    return masked_targets(labels, wanted, np.full(len(labels), labels.size / max(1, wanted.sum())))


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
