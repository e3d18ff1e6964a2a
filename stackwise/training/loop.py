"""The one training loop."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stackwise.cache.loader import PrefetchLoader
from stackwise.config.training import OptimizerParams
from stackwise.errors import UserError
from stackwise.precision.dtypes import autocast
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.optimizer import build_optimizer, learning_rate_share, updates_in_backward

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
class Best:
    """The validation that was the best so far."""

    step: int = 0
    """Steps done then; 0: there was none, or none that was a number."""
    loss: float = math.inf


@dataclass(frozen=True)
class EarlyStopping:
    """Training ends when validation has not improved for a while, with the weights that were the best (Prechelt 1998,
    Early Stopping - But When?)."""

    validate: Callable[[], float]
    """The validation loss; the module is in evaluation mode meanwhile. A pure function of the weights."""
    every: int
    """Steps between validations; the last step is validated too."""
    patience: int
    """Validations without an improvement after which training ends."""
    best: Best = field(default_factory=Best)
    """Kept by training."""

    def ends(self, done: int) -> bool:
        """Whether training ends after `done` steps."""
        return done - self.best.step >= self.patience * self.every


@dataclass
class Run(Generic[Batch]):
    """Everything that training needs to know."""

    module: nn.Module
    """Holds everything that trains: what requires a gradient before the first call of `begin_step`."""
    batches: Callable[[int], Sequence[Batch]]
    """The micro-batches of a step (from 0); called ahead of time in another thread."""
    loss: Callable[[Batch], Tensor]
    """The loss of a micro-batch (scalar); the step's loss is the mean over its micro-batches."""
    steps: int
    lr: float
    """Peak learning rate."""
    optimizer: OptimizerParams
    device: torch.device
    dtype: str
    """Compute format: a key of `stackwise.precision.dtypes.DTYPES`."""
    checkpoints: Checkpoints
    checkpoint_every: int
    seed: int = 0
    """Of what is drawn in passes (dropout)."""
    prefetch: int = 4
    begin_step: Callable[[int], None] = lambda step: None
    """Called with the number of each step before it is taken. It may freeze parameters and unfreeze them: one that has
    no gradient in a step is left as it is."""
    lrs: Mapping[str, float] = field(default_factory=dict)
    """Peak learning rates of parameters that have another than `lr`, by name."""
    stopping: EarlyStopping | None = None


WATCH_EVERY = 10
"""Steps between two calls of `Watcher.stepped`: each call waits for the device."""


def train(run: Run[Batch], watcher: Watcher) -> list[float]:
    """Train, resuming from a checkpoint if there is one.

    The result depends on the run alone: what a step sees is a function of its number, so a resumed run ends in the same
    bits as one that was never interrupted. With early stopping a checkpoint is written after every validation that is
    the best so far: the best weights are kept there, not in memory.

    Returns:
        The loss of every step that was taken (nats).

    Raises:
        UserError: `optimizer.in_backward` with fp16; or a checkpoint with the best weights has gone.
    """
    parameters = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
    _check(run, parameters)
    optimizer = build_optimizer(parameters, run.optimizer, run.lr, run.lrs)
    updates: AbstractContextManager[None] = nullcontext()
    if run.optimizer.in_backward:
        updates = updates_in_backward(parameters.values(), optimizer)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == "fp16")
    start, facts = run.checkpoints.load(parameters, optimizer)
    losses: list[float] = facts.get("losses", [])
    best = run.stopping.best if run.stopping else Best()
    vars(best).update(facts.get("best", {}))
    if start:
        scaler.load_state_dict(facts["scaler"])
        watcher.resumed(start)
    run.module.train()
    recent: list[Tensor] = []
    done = start
    with updates, PrefetchLoader(run.batches, range(start, run.steps), depth=run.prefetch) as loader:
        for step, micro_batches in enumerate(loader, start):
            run.begin_step(step)
            torch.manual_seed(_seed_of_step(run.seed, step))
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_share(run.optimizer, step, run.steps)
            recent.append(_step(run, micro_batches, optimizer, scaler, parameters))
            done = step + 1
            improved = _validate(run, done)
            last = done == run.steps or (run.stopping is not None and run.stopping.ends(done))
            checkpoint_due = not last and (improved or done % run.checkpoint_every == 0)
            if done % WATCH_EVERY == 0 or checkpoint_due or last:
                fresh = torch.stack(recent).tolist()
                recent.clear()
                losses += fresh
                watcher.stepped(done, fresh, loader.waited)
            if checkpoint_due:
                facts = {"losses": losses, "scaler": scaler.state_dict(), "best": vars(best)}
                run.checkpoints.save(done, parameters, optimizer, facts, best=best.step or None)
            if last:
                break
    if 0 < best.step < done:
        run.checkpoints.restore_best(parameters)
        run.begin_step(best.step - 1)  # what is redrawn is drawn again as it was then
    run.module.eval()
    return losses


def _check(run: Run[Batch], parameters: Collection[str]) -> None:
    assert {*run.lrs} <= {*parameters}, f"these do not train: {sorted({*run.lrs} - {*parameters})}"
    if run.optimizer.in_backward and run.dtype == "fp16":
        raise UserError(
            "params.yaml: optimizer.in_backward = true: expected false with compute.dtype fp16, where a step is left "
            "out if any gradient overflows, which is known only after the updates; set compute.dtype to bf16 or fp32"
        )


def _seed_of_step(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def _validate(run: Run[Batch], done: int) -> bool:
    """Whether the weights after `done` steps are the best so far; False if no validation is due."""
    stopping = run.stopping
    if stopping is None or (done % stopping.every and done < run.steps):
        return False
    run.module.eval()
    loss = stopping.validate()
    run.module.train()
    if improved := loss < stopping.best.loss:
        stopping.best.step, stopping.best.loss = done, loss
    return improved


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
