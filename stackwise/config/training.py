"""Sections of everything that trains: stacks, optimizer, joint fine-tuning, checkpoints."""

from typing import Literal

from pydantic import Field

from stackwise.config.model import AttentionParams, MLPParams
from stackwise.config.section import Section

Init = Literal["copy", "zero", "random"]


class StackParams(Section):
    """One stack and its training; the defaults for all stacks."""

    blocks: int = Field(default=2, ge=1)
    """Number of blocks (transformer layers)."""
    steps: int = Field(default=300, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per step."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    steps_factor: float = Field(default=1.0, gt=0)
    """What `steps` is multiplied by from each stack to the next (1: the same for all)."""
    lr_factor: float = Field(default=1.0, gt=0)
    """What `lr` is multiplied by from each stack to the next."""
    init: Init = "copy"
    """Weights of a new stack: `copy` of the one below, `zero` (its output projections are zero, so it starts as the
    identity) or `random`. The first stack has nothing to copy and starts at random."""
    stop_every: int | None = Field(default=None, ge=1)
    """Steps between two validations on held-out text, after which training may end before its last step with the best
    weights (null: it takes all steps)."""
    patience: int = Field(default=3, ge=1)
    """Validations without an improvement after which training ends (with `stop_every`)."""
    stop_samples: int = Field(default=32, ge=1)
    """Held-out samples of a validation, spread evenly over the split (with `stop_every`)."""

    def problems(self) -> list[tuple[str, str]]:
        """Settings of validations that there are not."""
        if self.stop_every is None:
            message = "has no effect without stop_every: give the steps between two validations or leave it out"
            return [(key, message) for key in self.changed(("patience", "stop_samples"))]
        return []


class StackOverrides(Section):
    """What one stack does differently from `stack`."""

    blocks: int | None = Field(default=None, ge=1)
    """Number of blocks of this stack."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of this stack."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per step of this stack."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this stack."""
    init: Init | None = None
    """Initial weights of this stack."""
    attention: AttentionParams | None = None
    """The keys of `model.attention` that are different in this stack; another `type` keeps only keys that it uses."""
    mlp: MLPParams | None = None
    """The keys of `model.mlp` that are different in this stack."""


class OptimizerParams(Section):
    """AdamW and its learning-rate schedule, wherever something trains."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Epsilon of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms are not decayed."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient (null: no clipping)."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches that a step's batch is cut into; must divide every batch size."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    """Learning rate after warm-up: `constant`, `linear` or `cosine` down to `final_lr`, or `wsd`: constant, then linear
    decay over the last `decay` share."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly from zero."""
    decay: float = Field(default=0.3, gt=0, le=1)
    """Share of the steps in which schedule `wsd` decays; with `warmup` at most 1."""
    final_lr: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    state: Literal["fp32", "int8"] = "fp32"
    """Format of the two moments: fp32, or 8 bits with a scale for every 256 values (Dettmers et al. 2022)."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is there, and drop the gradient: never are all in memory. Without
    `grad_clip` and `accumulate`."""

    def problems(self) -> list[tuple[str, str]]:
        """Phases that take more than all steps, and what needs all gradients at once."""
        found = []
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            message = f"expected at most {1 - self.warmup:g}, because warmup takes {self.warmup:g} of the steps"
            found.append(("decay", message))
        if self.in_backward and self.grad_clip is not None:
            message = "expected null with in_backward: the norm of the whole gradient is known only after the updates"
            found.append(("grad_clip", message))
        if self.in_backward and self.accumulate > 1:
            found.append(("accumulate", "expected 1 with in_backward, which keeps no gradient to add to"))
        return found


class JointParams(Section):
    """Joint fine-tuning of the whole fused rack."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Steps of joint fine-tuning as a share of the steps of all stacks together (0: none)."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""


class CheckpointParams(Section):
    """Resuming interrupted stages. Changes no result."""

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
