"""The loss of a window on held-out text, while it trains."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from stackwise.config.objective import MASKED, ObjectiveParams
from stackwise.data.tokens import Tokens
from stackwise.errors import UserError
from stackwise.growth.batches import segments_of
from stackwise.growth.window import Batch, Trunk, Window
from stackwise.model.context import Context
from stackwise.objectives.held_out import BoundObjective, spread
from stackwise.objectives.targets import CausalObjective, CustomObjective, Objective
from stackwise.precision.dtypes import autocast


def held_out_batches(
    tokens: Tokens,
    objective: Objective,
    *,
    samples: int,
    batch_size: int,
    document_mask: bool,
    trunk: Trunk | None = None,
    device: torch.device,
    keep: torch.dtype = torch.float32,
    key: str = "stack",
) -> list[Batch]:
    """Held-out text as a window sees it; always the same.

    Args:
        tokens: of which the validation split is taken.
        objective: what is asked of it, once of each sample.
        samples: how many, spread evenly over the split.
        batch_size: samples of a batch.
        document_mask: whether attention stays within documents.
        trunk: frozen stacks below the window: all passes through them here, and the boundary is kept.
        device: computes that.
        keep: format in which the boundary is kept, on the CPU.
        key: the section that holds `stop_samples`, for messages.

    Raises:
        UserError: none of the samples asks for anything.
    """
    chosen, batches = spread(len(tokens.validation), samples), []
    numbers = np.arange(len(chosen))
    for part in np.array_split(numbers, math.ceil(len(chosen) / batch_size)):
        ids = tokens.validation.samples(chosen[part])
        task = objective(ids, chosen[part], part)
        eos_id = tokens.vocabulary.eos_id if document_mask else None
        segments = segments_of(tokens.validation, chosen[part], ids, eos_id)
        times = torch.from_numpy(task.times.astype(np.float32))
        inputs = torch.from_numpy(task.inputs)
        if trunk is not None:
            context = Context(
                objective.causal, None if segments is None else segments.to(device), times=times.to(device)
            )
            inputs = trunk(inputs.to(device), context).to("cpu", keep)
        batches.append(Batch(inputs, task.targets, times, segments))
    if not any(len(batch.targets.rows) for batch in batches):
        raise UserError(
            f"{key}.stop_samples = {samples}: none of these held-out samples has a label; raise it or the "
            f"validation_fraction of the data, give documents with labels, or set {key}.stop_every to null"
        )
    return batches


def held_out_objective(params: ObjectiveParams, tokens: Tokens, seed: int) -> Objective:
    """What held-out text is asked for: the NELBO where tokens are masked, else what training asks."""
    if params.type in MASKED:
        return BoundObjective(seed, tokens.vocabulary.mask_id)
    return CausalObjective() if params.type == "clm" else CustomObjective(tokens.validation, params.causal)


class Validation:
    """The validation loss of a window while it trains."""

    def __init__(
        self, window: Window, batches: Sequence[Batch], *, causal: bool, device: torch.device, dtype: str
    ) -> None:
        """
        Args:
            window: what trains.
            batches: from `held_out_batches`.
            causal: whether a position may only look back.
            device: where the window is while it trains.
            dtype: compute format.
        """
        self._window, self._batches, self._causal = window, batches, causal
        self._device, self._dtype = device, dtype

    def loss(self) -> float:
        """The mean over all samples of the window, which is in evaluation mode (nats per token): what training adds to
        the loss, such as the balance of experts, does not count."""
        device, causal = self._device, self._causal
        with torch.no_grad(), autocast(device, self._dtype):
            losses = [
                float(self._window.loss(batch, device=device, causal=causal)) * len(batch.inputs)
                for batch in self._batches
            ]
        return math.fsum(losses) / sum(len(batch.inputs) for batch in self._batches)
