"""Block and Stack: the residual stream goes in and comes out."""

from torch import Tensor, nn

from stackwise.config.model import ModelParams
from stackwise.model.attention import ATTENTION
from stackwise.model.mlp import SwiGLU


class Block(nn.Module):
    """One pre-norm transformer layer (Touvron et al. 2023, Llama).

    Time conditioning belongs at the two norms, adapters on the projections of `attention` and `mlp`.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(params.d_model, eps=params.norm_eps)
        self.attention = ATTENTION[params.attention.type](params)
        self.mlp_norm = nn.RMSNorm(params.d_model, eps=params.norm_eps)
        self.mlp = SwiGLU(params)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`."""
        x = x + self.attention(self.attention_norm(x), causal=causal)
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """A few consecutive blocks: the unit of training. Maps boundary k to boundary k + 1."""

    def __init__(self, params: ModelParams, n_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(params) for _ in range(n_blocks))

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """Boundary k `[batch, seq, d_model]` -> boundary k + 1 `[batch, seq, d_model]`."""
        for block in self.blocks:
            x = block(x, causal=causal)
        return x
