"""Attention variants. A variant is one module here and one entry in `ATTENTION`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import ModelParams
from stackwise.model.rope import rotary_table, rotate


class Attention(nn.Module):
    """Multi-head attention, or grouped-query attention (Ainslie et al. 2023) when `n_kv_heads` < `n_heads`.

    The same weights serve bidirectional and causal use.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        attention = params.attention
        self.n_heads = attention.n_heads
        self.n_kv_heads = attention.n_kv_heads or attention.n_heads
        self.head_dim = params.d_model // attention.n_heads
        self.rope_theta = attention.rope_theta
        kv_width = self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(params.d_model, params.d_model, bias=False)
        self.k_proj = nn.Linear(params.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(params.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(params.d_model, params.d_model, bias=False)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`."""
        batch, seq, width = x.shape
        q = self.q_proj(x).view(batch, seq, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, seq, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, seq, self.n_kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = rotary_table(seq, self.head_dim, self.rope_theta, x.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        grouped = self.n_kv_heads != self.n_heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, width))


ATTENTION: dict[str, Callable[[ModelParams], nn.Module]] = {"standard": Attention, "gqa": Attention}
"""Builder of each value of `model.attention.type`."""
