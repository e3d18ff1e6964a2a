"""Window: the stacks that are in memory and in the loop while something trains."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackwise.model.context import Context
from stackwise.model.embeddings import Embeddings
from stackwise.model.frozen import RedrawnFeatures
from stackwise.model.rack import Head, Rack
from stackwise.model.stack import Stack
from stackwise.objectives.loss import embedding_loss, target_loss
from stackwise.objectives.targets import Targets


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


class Window(nn.Module):
    """Some consecutive stacks with the head, and with the embeddings if tokens go in or the head is tied to them.

    What requires a gradient trains. The lowest window of a rack and a whole rack read tokens, the others a boundary.
    """

    def __init__(self, stacks: Iterable[Stack], head: Head, embeddings: Embeddings | None = None) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.stacks = nn.ModuleList(stacks)
        self.head = head

    @classmethod
    def of(cls, rack: Rack) -> "Window":
        """The whole rack as a window; it shares the rack's weights."""
        return cls((stack for stack in rack.stacks if isinstance(stack, Stack)), rack.head, rack.embeddings)

    def forward(self, inputs: Tensor, context: Context) -> Tensor:
        """Inputs as in `Batch` -> the residual stream below the head `[batch, seq, d_model]` fp32."""
        if inputs.is_floating_point():
            x = inputs.float()
        else:
            assert self.embeddings is not None, "token ids need embeddings"
            x = self.embeddings(inputs)
        for stack in self.stacks:
            x = stack(x, context)
        return x

    def loss(self, batch: Batch, *, device: torch.device, causal: bool) -> Tensor:
        """The loss of a batch (scalar, fp32)."""
        inputs, times, segments = (
            None if part is None else part.to(device, non_blocking=True)
            for part in (batch.inputs, batch.times, batch.segments)
        )
        x = self(inputs, Context(causal=causal, segments=segments, times=times))
        targets = batch.targets.to(device)
        loss = target_loss(self.head, x, targets)
        if targets.embedding_weight:
            assert self.embeddings is not None, "the embedding term needs embeddings"
            loss = loss + embedding_loss(self.embeddings, x, targets)
        for part in self.modules():
            if (own := getattr(part, "balance_loss", None)) is not None:
                loss = loss + own
        return loss

    def begin_step(self, step: int) -> None:
        """Before each training step (from 0): parts whose random features are redrawn do so when it is time."""
        for part in self.modules():
            if isinstance(part, RedrawnFeatures):
                part.begin_step(step)

    def compile(self) -> None:
        """Compile each stack (`torch.compile`); names and weights stay as they are."""
        for stack in self.stacks:
            stack.compile()
