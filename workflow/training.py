"""What the stages that train have in common: from a window and its batches to trained weights and a loss curve."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from stackwise.artifacts.manifest import Artifact
from stackwise.config.objective import ObjectiveParams
from stackwise.data.tokens import Tokens
from stackwise.growth.batches import TokenBatches
from stackwise.growth.pretraining import build_objective, visiting_order
from stackwise.growth.racks import KIND, load_rack, save_rack
from stackwise.growth.window import Batch, Window
from stackwise.objectives.words import Words
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
            begin_step=window.begin_step,
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
    objective_params: ObjectiveParams,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device,
) -> None:
    """Train all stacks of a rack together, on whatever mask rates the parameters let them draw, and publish the result
    as `--out`, with its tokenizer."""
    rack = load_rack(model.path)
    window = Window.of(rack)
    seed, time, vocabulary = run.params.seed, rack.shape.model.time, tokens.vocabulary
    order = visiting_order(len(tokens.train), seed=seed, stream=run.stage.name, time=time, batch_size=batch_size)
    objective = build_objective(
        objective_params,
        time,
        seed=seed,
        tokens=tokens.train,
        mask_id=vocabulary.mask_id,
        words=Words(tokens.word_starts, vocabulary.eos_id),
        order=order,
        batch_size=batch_size,
        steps=steps,
    )
    eos_id = tokens.vocabulary.eos_id if rack.shape.model.document_mask else None
    batches = TokenBatches(tokens.train, order, objective, batch_size, run.params.optimizer.accumulate, eos_id)
    losses = train_window(
        run, window, batches, causal=objective.causal, steps=steps, batch_size=batch_size, lr=lr, device=device
    )
    with run.publish(run.arguments.out, KIND) as draft:
        save_rack(draft.directory, rack.cpu(), tokens.tokenizer)
        draft.facts |= {"shape": rack.shape.to_json(), "steps": steps}
    finish(run, losses)
