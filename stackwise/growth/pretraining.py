"""The objective of what trains, from the parameters."""

import math

import numpy as np
from numpy.typing import NDArray

from stackwise.config.model import TimeParams
from stackwise.config.objective import ObjectiveParams
from stackwise.data.order import SampleOrder, groups_of
from stackwise.data.tokens import TokenDataset
from stackwise.objectives.masks import MaskRates
from stackwise.objectives.schedules import Curriculum, MaskScheduler
from stackwise.objectives.targets import (
    CausalObjective,
    CompletionObjective,
    CustomObjective,
    MaskDiffusionObjective,
    Objective,
)
from stackwise.objectives.words import Words


def visiting_order(n: int, *, seed: int, stream: str, time: TimeParams, batch_size: int) -> SampleOrder:
    """The order in which training visits `n` samples; with one t for a batch, the samples of a batch stay together.

    Raises:
        UserError: there is not even one batch of samples that stay together.
    """
    return SampleOrder(n, seed=seed, stream=stream, group=_group(time, batch_size))


def build_objective(
    params: ObjectiveParams,
    time: TimeParams,
    *,
    seed: int,
    tokens: TokenDataset,
    mask_id: int,
    words: Words | None,
    order: SampleOrder,
    batch_size: int,
    steps: int,
    cached: bool = False,
    fraction: float | None = None,
) -> Objective:
    """The objective that the parameters describe for one training.

    Args:
        params: the section `objective`.
        time: `model.time`, which says whether a batch shares t.
        seed: of the pipeline.
        tokens: the training split; where its rows are packed, only what has a label is asked for.
        mask_id: id of the mask token.
        words: for whole-word masking.
        order: in which the samples are visited.
        batch_size: samples per step.
        steps: of the training.
        cached: whether it reads cached activations, which hold only `objective.variants` mask variants.
        fraction: the mask rate, where a stack has one of its own.
    """
    if params.type == "clm":
        return CompletionObjective(tokens) if tokens.packed else CausalObjective()
    if params.type == "custom":
        return CustomObjective(tokens, params.causal)
    curriculum = None
    if params.by_training:
        assert params.schedule is not None
        if cached or params.masks != "fresh":  # later visits find the masks of the first
            steps = min(steps, math.ceil(params.variants * order.n / batch_size))
        scheduler = MaskScheduler(params.schedule, params.mask_min, params.mask_max)
        curriculum = Curriculum(scheduler, order, batch_size, steps)
    groups = _groups(len(tokens), _group(time, batch_size), seed)
    rates = MaskRates(params, seed, fraction=fraction, curriculum=curriculum, groups=groups)
    only = tokens if tokens.packed else None
    return MaskDiffusionObjective(params, seed, mask_id, rates=rates, words=words, only=only)


def _group(time: TimeParams, batch_size: int) -> int:
    """How many samples share their t."""
    return batch_size if time.sampling == "batch" else 1


def _groups(n: int, size: int, seed: int) -> NDArray[np.int64] | None:
    """The number of each sample's group `[n]`; those that fill none share one. None where no samples share t."""
    if size == 1:
        return None
    groups = groups_of(n, size, seed=seed)
    numbers = np.full(n, len(groups))
    numbers[groups] = np.arange(len(groups))[:, None]
    return numbers
