"""What the stages that train have in common: from a window and its batches to trained weights and a loss curve."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from stackwise.artifacts.manifest import Artifact
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import Tokens
from stackwise.growth.batches import TokenBatches
from stackwise.growth.racks import KIND, load_rack, save_rack
from stackwise.growth.window import Batch, Window
from stackwise.objectives.targets import Objective
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Run, train
from workflow.stage import StageRun, TrainingWatcher

LOSS_POINT_STEPS = 10
"""Steps that a point of a loss curve averages over."""


def train_window(
    run: StageRun,
    window: Window,
    batches: Callable[[int], Sequence[Batch]],
    *,
    causal: bool,
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device,
) -> list[float]:
    """Train `window` in place, from this stage's checkpoint if there is one; returns the loss of every step.

    The checkpoint stays until `finish` is called, after the stage has published its result.
    """
    params = run.params
    if params.compute.compile:
        window.compile()
    return train(
        Run(
            module=window.to(device),
            batches=batches,
            loss=partial(window.loss, device=device, causal=causal),
            steps=steps,
            lr=lr,
            optimizer=params.optimizer,
            device=device,
            dtype=params.compute.dtype,
            checkpoints=Checkpoints(run.checkpoint_file()),
            checkpoint_every=params.checkpoint.every,
            prefetch=params.activations.prefetch,
        ),
        TrainingWatcher(run, steps=steps, tokens_per_step=batch_size * params.seq_len),
    )


def finish(run: StageRun, losses: list[float]) -> None:
    """Write the loss curve to `--losses`, a point for every few steps, and drop the checkpoint."""
    ends = [*range(LOSS_POINT_STEPS, len(losses), LOSS_POINT_STEPS), len(losses)]
    points = [
        {"step": end, "loss": float(np.mean(losses[start:end]))} for start, end in zip([0, *ends], ends, strict=False)
    ]
    run.write_json(run.arguments.losses, points)
    Checkpoints(run.checkpoint_file()).discard()


def tune_rack(
    run: StageRun,
    model: Artifact,
    tokens: Tokens,
    objective: Objective,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device,
) -> None:
    """Train all stacks of a rack together and publish the result as `--out`, with its tokenizer."""
    rack = load_rack(model.path)
    window = Window.of(rack)
    order = SampleOrder(len(tokens.train), seed=run.params.seed, stream=run.stage.name)
    batches = TokenBatches(tokens.train, order, objective, batch_size, run.params.optimizer.accumulate)
    losses = train_window(
        run, window, batches, causal=objective.causal, steps=steps, batch_size=batch_size, lr=lr, device=device
    )
    with run.publish(run.arguments.out, KIND) as draft:
        save_rack(draft.directory, rack.cpu(), tokens.tokenizer)
        draft.facts |= {"shape": rack.shape.to_json(), "steps": steps}
    finish(run, losses)
