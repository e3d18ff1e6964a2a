"""Window: the stacks that are in memory and in the loop while something trains."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stackwise.model.context import Context
from stackwise.model.embeddings import Embeddings
from stackwise.model.frozen import RedrawnFeatures
from stackwise.model.rack import Head, Rack
from stackwise.model.stack import Stack
from stackwise.objectives.loss import consistency_loss, embedding_loss, target_loss
from stackwise.objectives.targets import Targets
from stackwise.precision.dtypes import autocast

Trunk = Callable[[Tensor, Context], Tensor]
"""Frozen stacks below a window: token ids `[batch, seq]` -> the boundary `[batch, seq, d_model]`, without gradients."""


@dataclass
class Batch:
    """What goes into a window."""

    inputs: Tensor
    """Token ids `[batch, seq]` int64, or the boundary below the window `[batch, seq, d_model]`."""
    targets: Targets
    times: Tensor | None = None
    """The mask rate t of each sample `[batch]` fp32."""
    segments: Tensor | None = None
    """Numbers of the documents `[batch, seq]` int64, where attention stays within them."""
    known: Tensor | None = None
    """Token ids `[batch, seq]` int64 as the stacks above a new one have learned to read them."""


@dataclass
class Unfreezing:
    """Gradual unfreezing (Howard & Ruder 2018): parts begin to learn one after another."""

    parts: Sequence[nn.Module]
    """In the order in which they are unfrozen."""
    steps: int
    """The steps over which that happens."""

    def begin_step(self, step: int) -> None:
        """Freeze and unfreeze as is right for a step (from 0): part i of n learns from step `steps * (i + 1) / n`."""
        for i, part in enumerate(self.parts):
            learns = step >= round(self.steps * (i + 1) / len(self.parts))
            for parameter in self._parameters_of(part):
                parameter.requires_grad_(learns)

    def _parameters_of(self, part: nn.Module) -> list[nn.Parameter]:
        """Those that learn sooner or later."""
        return self._learning.setdefault(id(part), [p for p in part.parameters() if p.requires_grad])

    _learning: dict[int, list[nn.Parameter]] = field(default_factory=dict)


class Window(nn.Module):
    """Some consecutive stacks with the head, and with the embeddings if tokens go in or the head is tied to them.

    What requires a gradient trains. A window reads tokens or a boundary; below one that reads tokens there may be
    frozen stacks that it does not hold.
    """

    def __init__(
        self,
        stacks: Iterable[Stack],
        head: Head,
        embeddings: Embeddings | None = None,
        *,
        trunk: Trunk | None = None,
        consistency: float = 0.0,
        unfreezing: Unfreezing | None = None,
        checkpointing: bool = False,
        compute: Sequence[str | None] = (),
    ) -> None:
        """
        Args:
            stacks: bottom to top.
            head: the final norm and the projection.
            embeddings: of the tokens.
            trunk: the frozen stacks below, if tokens must pass through them first.
            consistency: weight of the distance between what the lowest stack puts out and `Batch.known`.
            unfreezing: of the parts that do not learn from the first step.
            checkpointing: keep only the inputs of blocks for the backward pass.
            compute: format of the matrix products of each stack; None, or nothing given: that of what surrounds them.
        """
        super().__init__()
        self.embeddings = embeddings
        self.stacks = nn.ModuleList(stacks)
        self.head = head
        self._trunk, self._consistency, self._unfreezing = trunk, consistency, unfreezing
        self._compute = tuple(compute) or (None,) * len(self.stacks)
        for stack in self.stacks:
            stack.checkpointing = checkpointing  # type: ignore[assignment]

    @classmethod
    def of(cls, rack: Rack, *, checkpointing: bool = False) -> "Window":
        """The whole rack as a window; it shares the rack's weights."""
        stacks = (stack for stack in rack.stacks if isinstance(stack, Stack))
        return cls(stacks, rack.head, rack.embeddings, checkpointing=checkpointing)

    def forward(self, inputs: Tensor, context: Context) -> Tensor:
        """Inputs as in `Batch` -> the residual stream below the head `[batch, seq, d_model]` fp32."""
        return self._streams(inputs, context)[-1]

    def _streams(self, inputs: Tensor, context: Context) -> list[Tensor]:
        """What each stack puts out, bottom to top; the first entry is what goes into the lowest."""
        if inputs.is_floating_point():
            x = inputs.float()
        elif self._trunk is not None:
            x = self._trunk(inputs, context)
        else:
            assert self.embeddings is not None, "token ids need embeddings"
            x = self.embeddings(inputs)
        streams = [x]
        for stack, compute in zip(self.stacks, self._compute, strict=True):
            with nullcontext() if compute is None else autocast(x.device, compute):
                streams.append(stack(streams[-1], context))
        return streams

    def loss(self, batch: Batch, *, device: torch.device, causal: bool) -> Tensor:
        """The loss of a batch (scalar, fp32)."""
        inputs = batch.inputs.to(device, non_blocking=True)
        times, segments = (
            None if part is None else part.to(device, non_blocking=True) for part in (batch.times, batch.segments)
        )
        streams = self._streams(inputs, Context(causal=causal, segments=segments, times=times))
        x, targets = streams[-1], batch.targets.to(device)
        loss = target_loss(self.head, x, targets)
        if targets.embedding_weight:
            assert self.embeddings is not None, "the embedding term needs embeddings"
            loss = loss + embedding_loss(self.embeddings, x, targets)
        if batch.known is not None:
            assert self.embeddings is not None, "the consistency term needs embeddings"
            known = self.embeddings(batch.known.to(device, non_blocking=True))
            loss = loss + self._consistency * consistency_loss(streams[1], known)
        for part in self.modules():
            if (own := getattr(part, "balance_loss", None)) is not None:
                loss = loss + own
        return loss

    def train(self, mode: bool = True) -> "Window":
        """As of any module, but what learns nothing stays as it computes in use: without dropout."""
        super().train(mode)
        for stack in self.stacks:
            if not any(p.requires_grad for p in stack.parameters()):
                stack.eval()
        return self

    def begin_step(self, step: int) -> None:
        """Before each training step (from 0): parts are unfrozen, and random features of stacks that learn redrawn,
        when it is time."""
        if self._unfreezing is not None:
            self._unfreezing.begin_step(step)
            self.train()  # with dropout from now on what learns from now on
        for stack in self.stacks:
            for part in stack.modules() if stack.training else ():
                if isinstance(part, RedrawnFeatures):
                    part.begin_step(step)

    def compile(self) -> None:
        """Compile each stack (`torch.compile`); names and weights stay as they are."""
        for stack in self.stacks:
            stack.compile()
