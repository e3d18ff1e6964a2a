"""Multi-head and grouped-query attention through PyTorch's fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import ModelParams
from stackwise.model.context import Context
from stackwise.model.norm import RMSNorm
from stackwise.model.rope import Rope, rotary_table, rotate


class KeyValueCache:
    """Keys and values of the positions seen so far."""

    def __init__(self, batch: int, heads: int, capacity: int, dims: tuple[int, int], like: Tensor) -> None:
        """
        Args:
            batch, heads, capacity: sizes; `capacity` is the most positions.
            dims: widths of a key and of a value.
            like: a tensor of the device and dtype to use.
        """
        self.length = 0
        self._keys, self._values = (like.new_empty(batch, heads, capacity, dim) for dim in dims)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values `[batch, heads, seq, dim]`; returns those of all positions seen."""
        start, self.length = self.length, self.length + keys.shape[2]
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def bytes(self) -> int:
        """Memory that it takes."""
        return self._keys.nbytes + self._values.nbytes


class DenseAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), or grouped-query attention (Ainslie et al. 2023) when `n_kv_heads` <
    `n_heads`.

    With `qk_norm` every head's queries and keys pass an RMSNorm before the rotation (Henry et al. 2020). The same
    weights serve bidirectional and causal use.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        attention = params.attention
        self.n_heads = attention.n_heads
        self.n_kv_heads = attention.n_kv_heads or attention.n_heads
        self._heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        self.head_dim = attention.head_dim or params.d_model // attention.n_heads
        self.dropout = attention.dropout
        self.rope = Rope.of(attention)
        self.q_proj = nn.Linear(params.d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(params.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(params.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, params.d_model, bias=False)
        self.qkv_proj: nn.Module | None = None
        """In place of the first three, one product for them all (`stackwise.generation.packing`)."""
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, params.norm_eps) if attention.qk_norm else None for _ in range(2)
        )

    def forward(self, x: Tensor, context: Context, cache: KeyValueCache | None = None) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`; see `parts.Attention`."""
        batch, seq, _ = x.shape
        q, k, v = self.queries_keys_values(x, context.start(cache.length if cache else 0))
        if cache:
            k, v = cache.extend(k, v)
        mixed = attend(q, k, v, context, dropout=self.dropout if self.training else 0.0)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))

    def queries_keys_values(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `[batch, n_heads, seq, head_dim]`, rotated keys and values
        `[batch, n_kv_heads, seq, head_dim]` of the positions from `start` (see `rotary_table`)."""
        batch, seq, _ = x.shape
        if self.qkv_proj is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = self.qkv_proj(x).split([h * self.head_dim for h in self._heads], dim=-1)
        q, k, v = (part.view(batch, seq, h, self.head_dim) for part, h in zip((q, k, v), self._heads, strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rotary_table(start, seq, self.head_dim, self.rope, x.device)
        return rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for up to `capacity` positions."""
        like = torch.empty(0, device=device, dtype=dtype)
        return KeyValueCache(batch, self.n_kv_heads, capacity, (self.head_dim, self.head_dim), like)


def attend(
    q: Tensor, k: Tensor, v: Tensor, context: Context, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Softmax attention under a context; the queries are those of the last positions of the keys.

    Args:
        q: `[batch, n_heads, n, dim]`.
        k, v: `[batch, n_kv_heads, m, dim]`, `[batch, n_kv_heads, m, v_dim]`, m >= n.
        context: whether causal, and segments of the m positions.
        dropout: share of the weights that is dropped.
        scale: of the scores; `dim ** -0.5` if None.

    Returns:
        `[batch, n_heads, n, v_dim]`.
    """
    n, m = q.shape[2], k.shape[2]
    mask = context.allowed(n, m)
    if mask is None and context.causal and 1 < n < m:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=context.causal and mask is None and n == m,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
