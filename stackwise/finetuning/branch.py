"""What all branches of fine-tuning have in common: how they begin, learn and are saved."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from stackwise.config.params import Params
from stackwise.config.tuning import FineTuneParams
from stackwise.data.tokens import Tokens
from stackwise.growth.batches import TokenBatches
from stackwise.growth.racks import load_rack
from stackwise.growth.tuning import train_window
from stackwise.growth.validation import Validation, held_out_batches
from stackwise.growth.window import Window
from stackwise.model.rack import Rack
from stackwise.objectives.targets import Objective
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import EarlyStopping, Watcher
from stackwise.variants import adapted_racks

M = TypeVar("M", bound=nn.Module)


@dataclass
class Tuned(Generic[M]):
    """A model that has learned, on the CPU."""

    model: M
    losses: list[float]
    """Of every step that was taken (nats)."""
    best_step: int | None
    """With early stopping: the steps after which the weights were these, the best; 0 if no validation was finite."""

    @property
    def facts(self) -> dict[str, Any]:
        """For its artifact."""
        steps = {"steps": len(self.losses)}
        return steps if self.best_step is None else {**steps, "best_step": self.best_step}


def load_base(directory: Path, branch: FineTuneParams, *, name: str, seed: int, device: torch.device) -> Rack:
    """The rack as a branch begins with it: all of it learns, or adapters alone.

    Raises:
        UserError: see `stackwise.finetuning.adapters.load_adapted`.
    """
    if branch.method == "full":
        return load_rack(directory)
    rack: Rack = adapted_racks().load_adapted(directory, branch, key=f"fine_tune.{name}", seed=seed, device=device)
    return rack


def learn(
    params: Params,
    name: str,
    window: Window,
    batches: TokenBatches,
    tokens: Tokens,
    held_out: Objective,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    watcher: Watcher,
) -> tuple[list[float], int | None]:
    """Train what requires a gradient in a window, in place, as a branch says.

    Args:
        params: with seed, optimizer, compute and `fine_tune.<name>`.
        name: of the branch.
        window: the whole model.
        batches: of which the objective trains.
        tokens: of which the validation split tells when to stop.
        held_out: what is asked of it.
        device, checkpoints, watcher: as of `fine_tune`.

    Returns:
        The loss of every step that was taken (nats), and `Tuned.best_step`.

    Raises:
        UserError: none of the held-out samples has a label; or see `train`.
    """
    branch = params.fine_tune[name]
    stopping = None
    if branch.stop_every is not None:
        held = held_out_batches(
            tokens,
            held_out,
            samples=branch.stop_samples,
            batch_size=branch.batch_size,
            document_mask=batches.eos_id is not None,
            device=device,
            key=f"fine_tune.{name}",
        )
        validation = Validation(window, held, causal=held_out.causal, device=device, dtype=params.compute.dtype)
        stopping = EarlyStopping(validation.loss, branch.stop_every, branch.patience)
    losses = train_window(
        params,
        window,
        batches,
        causal=batches.objective.causal,
        steps=branch.steps,
        lr=branch.lr,
        lrs=_rates(branch, window),
        stopping=stopping,
        device=device,
        checkpoints=checkpoints,
        watcher=watcher,
    )
    return losses, None if stopping is None else stopping.best.step


def save_tuned(
    branch: FineTuneParams, tuned: Tuned[M], directory: Path, tokenizer: Path, save: Callable[[Path, M, Path], None]
) -> None:
    """Write a model that has learned.

    Args:
        branch: which says what becomes of adapters.
        tuned: the model, which is in fp32 afterwards.
        directory: where its files go; it exists.
        tokenizer: directory of its tokenizer.
        save: writes such a model.
    """
    if branch.method != "full":
        adapted_racks().finish(tuned.model, merge=branch.merge)
    save(directory, tuned.model, tokenizer)


def _rates(branch: FineTuneParams, window: Window) -> dict[str, float]:
    """The peak learning rate of adapters, if they have one of their own."""
    if branch.adapters is None or branch.adapters.lr is None:
        return {}
    return {n: branch.adapters.lr for n, p in window.named_parameters() if ".lora_" in n and p.requires_grad}
