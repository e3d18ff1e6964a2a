"""Latent projections, grouped heads and a kernel together."""

import torch
from torch import Tensor, nn

from stackwise.attention.features import build_features
from stackwise.attention.kernel import attend_by_features, new_sums
from stackwise.attention.latent import LatentProjections
from stackwise.attention.linear import RunningSums
from stackwise.config.model import ModelParams
from stackwise.model.context import Context


class LatentKernelAttention(nn.Module):
    """Attention type `mlgka`: queries, keys and values from latents of low rank, as in `mla`, with fewer heads of keys
    and values than of queries, as in `gqa`, mixed as in `kernel`.

    Decoding keeps the state of `kernel`, not the latents: no position's keys are ever needed again. The same weights
    serve bidirectional and causal use.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        attention = params.attention
        assert attention.n_kv_heads is not None, "the validation of params.yaml asks for it"
        self.projections = LatentProjections(params, attention.n_kv_heads)
        self.features = build_features(attention, attention.n_kv_heads, self.projections.qk_dim)
        self.o_proj = nn.Linear(attention.n_heads * self.projections.v_dim, params.d_model, bias=False)

    def forward(self, x: Tensor, context: Context, cache: RunningSums | None = None) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`; see `parts.Attention`."""
        batch, seq, _ = x.shape
        q, k, v = self.projections(x, context.start(cache.length if cache else 0))
        mixed = attend_by_features(self.features, q, k, v, context, cache)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> RunningSums:
        """An empty cache; its size does not depend on `capacity`."""
        return new_sums(self.features, (batch, self.projections.n_kv_heads, self.projections.v_dim), device, dtype)
