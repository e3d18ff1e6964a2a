"""Training of a window, and of a whole rack as one: from parameters to the loop."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from stackwise.config.model import ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params
from stackwise.data.tokens import Tokens
from stackwise.growth.batches import TokenBatches
from stackwise.growth.pretraining import build_objective, visiting_order
from stackwise.growth.window import Batch, Window
from stackwise.model.rack import Rack
from stackwise.objectives.words import Words
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import EarlyStopping, Run, Watcher, train

LOSS_POINT_STEPS = 10
"""Steps that a point of a loss curve averages over."""


def train_window(
    params: Params,
    window: Window,
    batches: Callable[[int], Sequence[Batch]],
    *,
    causal: bool,
    steps: int,
    lr: float,
    lrs: Mapping[str, float] | None = None,
    stopping: EarlyStopping | None = None,
    device: torch.device,
    checkpoints: Checkpoints,
    watcher: Watcher,
) -> list[float]:
    """Train `window` in place, from a checkpoint if there is one; returns the loss of every step (nats).

    Args:
        params: with seed, optimizer and compute.
        window: what requires a gradient trains.
        batches: the micro-batches of a step (from 0).
        causal: whether a position may only look back.
        steps: how many.
        lr: peak learning rate.
        lrs: those of parameters that have another, by name.
        stopping: when to stop before the last step.
        device: computes.
        checkpoints: of this run; they stay when it has ended, until its result is published.
        watcher: is told how it goes.

    Raises:
        UserError: see `train`.
    """
    if params.compute.compile:
        window.compile()
    return train(
        Run(
            module=window.to(device),
            batches=batches,
            begin_step=window.begin_step,
            loss=partial(window.loss, device=device, causal=causal),
            steps=steps,
            lr=lr,
            lrs=lrs or {},
            seed=params.seed,
            optimizer=params.optimizer,
            device=device,
            dtype=params.compute.dtype,
            checkpoints=checkpoints,
            checkpoint_every=params.checkpoint.every,
            prefetch=params.activations.prefetch,
            stopping=stopping,
        ),
        watcher,
    )


def tune_rack(
    params: Params,
    rack: Rack,
    tokens: Tokens,
    objective_params: ObjectiveParams,
    *,
    stream: str,
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device,
    checkpoints: Checkpoints,
    watcher: Watcher,
) -> list[float]:
    """Train all stacks of a rack together, in place, on whatever mask rates the parameters let them draw.

    Args:
        params: with seed, optimizer and compute.
        rack: what requires a gradient trains; afterwards it is on the CPU.
        tokens: what it learns from.
        objective_params: what it learns.
        stream: who visits the samples: each stream has an order of its own.
        steps, batch_size, lr: as of a stack.
        device, checkpoints, watcher: as of `train_window`.

    Returns:
        The loss of every step (nats).

    Raises:
        UserError: there are fewer samples than a batch that shares t has; or see `train`.
    """
    batches = rack_batches(
        params, rack.shape.model, tokens, objective_params, stream=stream, steps=steps, batch_size=batch_size
    )
    losses = train_window(
        params,
        Window.of(rack, checkpointing=params.compute.activation_checkpointing),
        batches,
        causal=batches.objective.causal,
        steps=steps,
        lr=lr,
        device=device,
        checkpoints=checkpoints,
        watcher=watcher,
    )
    rack.cpu()
    return losses


def rack_batches(
    params: Params,
    model: ModelParams,
    tokens: Tokens,
    objective_params: ObjectiveParams,
    *,
    stream: str,
    steps: int,
    batch_size: int,
) -> TokenBatches:
    """What each step of the training of a whole rack sees.

    Args:
        params: with seed and optimizer.
        model: the architecture, which says what is known of t and whether documents see each other.
        tokens: of which the training split is taken.
        objective_params: what is learned.
        stream, steps, batch_size: as of `tune_rack`.

    Raises:
        UserError: there are fewer samples than a batch that shares t has.
    """
    vocabulary = tokens.vocabulary
    order = visiting_order(len(tokens.train), seed=params.seed, stream=stream, time=model.time, batch_size=batch_size)
    objective = build_objective(
        objective_params,
        model.time,
        seed=params.seed,
        tokens=tokens.train,
        mask_id=vocabulary.mask_id,
        words=Words(tokens.word_starts, vocabulary.eos_id),
        order=order,
        batch_size=batch_size,
        steps=steps,
    )
    eos_id = vocabulary.eos_id if model.document_mask else None
    return TokenBatches(tokens.train, order, objective, batch_size, params.optimizer.accumulate, eos_id)


def loss_curve(losses: Sequence[float]) -> list[dict[str, float]]:
    """The losses of all steps as a curve: means over `LOSS_POINT_STEPS` steps, with the step at which each ends."""
    ends = [*range(LOSS_POINT_STEPS, len(losses), LOSS_POINT_STEPS), len(losses)]
    return [
        {"step": end, "loss": float(np.mean(losses[start:end]))} for start, end in zip([0, *ends], ends, strict=False)
    ]
