"""Window: the stacks that are in memory and in the loop while something trains."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackwise.model.rack import Head, Rack
from stackwise.model.stack import Stack
from stackwise.objectives.loss import target_loss
from stackwise.objectives.targets import Targets


@dataclass
class Batch:
    """What goes into a window."""

    inputs: Tensor
    """Token ids `[batch, seq]` int64, or the boundary below the window `[batch, seq, d_model]`."""
    targets: Targets


class Window(nn.Module):
    """Some consecutive stacks with the head, and with the embeddings if tokens go in or the head is tied to them.

    What requires a gradient trains. The lowest window of a rack and a whole rack read tokens, the others a boundary.
    """

    def __init__(self, stacks: Iterable[Stack], head: Head, embeddings: nn.Embedding | None = None) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.stacks = nn.ModuleList(stacks)
        self.head = head

    @classmethod
    def of(cls, rack: Rack) -> "Window":
        """The whole rack as a window; it shares the rack's weights."""
        return cls((stack for stack in rack.stacks if isinstance(stack, Stack)), rack.head, rack.embeddings)

    def forward(self, inputs: Tensor, *, causal: bool) -> Tensor:
        """Inputs as in `Batch` -> the residual stream below the head `[batch, seq, d_model]` fp32."""
        if inputs.is_floating_point():
            x = inputs.float()
        else:
            assert self.embeddings is not None, "token ids need embeddings"
            x = self.embeddings(inputs)
        for stack in self.stacks:
            x = stack(x, causal=causal)
        return x

    def loss(self, batch: Batch, *, device: torch.device, causal: bool) -> Tensor:
        """The loss of a batch (scalar, fp32)."""
        inputs = batch.inputs.to(device, non_blocking=True)
        return target_loss(self.head, self(inputs, causal=causal), batch.targets.to(device))

    def compile(self) -> None:
        """Compile each stack (`torch.compile`); names and weights stay as they are."""
        for stack in self.stacks:
            stack.compile()
