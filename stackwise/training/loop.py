"""The one training loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stackwise.cache.loader import PrefetchLoader
from stackwise.config.training import OptimizerParams
from stackwise.precision.dtypes import autocast
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.optimizer import build_optimizer, learning_rate_share

Batch = TypeVar("Batch")


class Watcher(Protocol):
    """Who is told how training goes; has no influence on it."""

    def resumed(self, step: int) -> None:
        """Training goes on after `step` steps of an earlier run."""

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        """`step` steps are done.

        Args:
            step: steps done.
            losses: of the steps since the last call.
            waited: seconds in all that the loop has waited for data.
        """


@dataclass
class Run(Generic[Batch]):
    """Everything that training needs to know."""

    module: nn.Module
    """Holds everything that trains; what requires no gradient stays as it is."""
    batches: Callable[[int], Sequence[Batch]]
    """The micro-batches of a step (from 0); called ahead of time in another thread."""
    loss: Callable[[Batch], Tensor]
    """The loss of a micro-batch (scalar); the step's loss is the mean over its micro-batches."""
    steps: int
    lr: float
    optimizer: OptimizerParams
    device: torch.device
    dtype: str
    """Compute format: a key of `stackwise.precision.dtypes.DTYPES`."""
    checkpoints: Checkpoints
    checkpoint_every: int
    prefetch: int = 4
    begin_step: Callable[[int], None] = lambda step: None
    """Called with the number of each step before it is taken."""


WATCH_EVERY = 10
"""Steps between two calls of `Watcher.stepped`: each call waits for the device."""


def train(run: Run[Batch], watcher: Watcher) -> list[float]:
    """Train, resuming from a checkpoint if there is one.

    The result depends on the run alone: what a step sees is a function of its number, so a resumed run ends in the same
    bits as one that was never interrupted.

    Returns:
        The loss of every step (nats).
    """
    parameters = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(parameters.values(), run.optimizer, run.lr)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == "fp16")
    start, facts = run.checkpoints.load(parameters, optimizer)
    losses: list[float] = facts.get("losses", [])
    if start:
        scaler.load_state_dict(facts["scaler"])
        watcher.resumed(start)
    run.module.train()
    recent: list[Tensor] = []
    with PrefetchLoader(run.batches, range(start, run.steps), depth=run.prefetch) as loader:
        for step, micro_batches in enumerate(loader, start):
            run.begin_step(step)
            for group in optimizer.param_groups:
                group["lr"] = run.lr * learning_rate_share(run.optimizer, step, run.steps)
            recent.append(_step(run, micro_batches, optimizer, scaler, parameters))
            done = step + 1
            checkpoint_due = done % run.checkpoint_every == 0 and done < run.steps
            if done % WATCH_EVERY == 0 or checkpoint_due or done == run.steps:
                fresh = torch.stack(recent).tolist()
                recent.clear()
                losses += fresh
                watcher.stepped(done, fresh, loader.waited)
            if checkpoint_due:
                run.checkpoints.save(done, parameters, optimizer, {"losses": losses, "scaler": scaler.state_dict()})
    run.module.eval()
    return losses


def _step(
    run: Run[Batch],
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: dict[str, nn.Parameter],
) -> Tensor:
    """One optimizer step; returns its loss (scalar, still on the device)."""
    total = torch.zeros((), device=run.device)
    for batch in micro_batches:
        with autocast(run.device, run.dtype):
            loss = run.loss(batch) / len(micro_batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    if run.optimizer.grad_clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters.values(), run.optimizer.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total
