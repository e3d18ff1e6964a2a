"""Attention as a kernel, by random features of queries and keys."""

import torch
from torch import Tensor

from stackwise.attention.dense import DenseAttention
from stackwise.attention.features import FeatureMap, build_features
from stackwise.attention.linear import RunningSums, linear_attention
from stackwise.config.model import ModelParams
from stackwise.model.context import Context


class KernelAttention(DenseAttention):
    """Attention type `kernel`: `out_i = sum_j K(q_i, k_j) v_j / sum_j K(q_i, k_j)` with `K(q, k)` the inner product of
    features (Rahimi & Recht 2007; Peng et al. 2021; Choromanski et al. 2021; Katharopoulos et al. 2020; `features` has
    the kernels).

    Projections, grouped heads, `qk_norm` and rotation are those of dense attention. Time and memory are linear in
    `seq`, decoding keeps a state of constant size. The same weights serve bidirectional and causal use.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__(params)
        self.features = build_features(params.attention, self.n_kv_heads, self.head_dim)

    def forward(self, x: Tensor, context: Context, cache: RunningSums | None = None) -> Tensor:  # type: ignore[override]
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`; see `parts.Attention`."""
        batch, seq, _ = x.shape
        q, k, v = self.queries_keys_values(x, context.start(cache.length if cache else 0))
        mixed = attend_by_features(self.features, q, k, v, context, cache)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))

    def new_cache(  # type: ignore[override]
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> RunningSums:
        """An empty cache; its size does not depend on `capacity`."""
        return new_sums(self.features, (batch, self.n_kv_heads, self.head_dim), device, dtype)


def attend_by_features(
    features: FeatureMap, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: RunningSums | None
) -> Tensor:
    """Kernel attention under a context. Features and their sums are fp32 (fp64 if `q` is), under autocast too.

    Args:
        features: the feature map.
        q: `[batch, n_heads, seq, width]`.
        k, v: `[batch, n_kv_heads, seq, width]`, `[batch, n_kv_heads, seq, v_dim]`.
        context: whether causal, and segments.
        cache: see `linear_attention`.

    Returns:
        `[batch, n_heads, seq, v_dim]` in the format of `v`.
    """
    precise = _at_least_fp32(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, k = features.queries(q.to(precise)), features.keys(k.to(precise))
        return linear_attention(q, k, v.to(precise), context, least=features.least, cache=cache).to(v.dtype)


def new_sums(
    features: FeatureMap, sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> RunningSums:
    """An empty cache of `sizes` (batch, n_kv_heads, v_dim), in fp32 at least."""
    batch, heads, v_dim = sizes
    shape = (batch, heads, features.size, v_dim + 1)
    return RunningSums(torch.zeros(shape, device=device, dtype=_at_least_fp32(dtype)))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
