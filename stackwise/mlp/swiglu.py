"""SwiGLU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stackwise.config.model import ModelParams
from stackwise.model.frozen import FrozenLinear


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, GLU Variants Improve Transformer).

    With `mlp.frozen_up` the gate and up projections are random features that are not learned: no gradient, no optimizer
    state, and only their seed is stored.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        d_model, hidden = params.d_model, params.mlp.hidden
        self.gate_proj: nn.Module
        self.up_proj: nn.Module
        if params.mlp.frozen_up:
            self.gate_proj, self.up_proj = FrozenLinear(d_model, hidden), FrozenLinear(d_model, hidden)
        else:
            self.gate_proj, self.up_proj = (nn.Linear(d_model, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, d_model, bias=False)
        self.gate_up_proj: nn.Module | None = None
        """In place of the first two, one product for both (`stackwise.generation.packing`)."""

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`."""
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if not torch.is_grad_enabled():  # the same numbers, without what the gradient takes
            return self.down_proj(F.silu(gate).mul_(up))
        return self.down_proj(_Gate.apply(gate, up))


class _Gate(torch.autograd.Function):
    """`silu(gate) * up`, written by hand so that the gradient keeps the two and not `silu(gate)` too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Any one shape."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `gate` and `up`."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
