"""Feed-forward networks."""

import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import ModelParams


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, GLU Variants Improve Transformer).

    With `mlp.frozen_up` the gate and up projections keep their random initial values: features that are not learned,
    with no gradient and no optimizer state.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(params.d_model, params.mlp.hidden, bias=False)
        self.up_proj = nn.Linear(params.d_model, params.mlp.hidden, bias=False)
        self.down_proj = nn.Linear(params.mlp.hidden, params.d_model, bias=False)
        if params.mlp.frozen_up:
            self.gate_proj.requires_grad_(False)
            self.up_proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
