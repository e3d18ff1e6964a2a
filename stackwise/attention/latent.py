"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1): keys and values come from a latent of low
rank, and that is all that decoding keeps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.attention.dense import attend
from stackwise.config.model import ModelParams
from stackwise.model.context import Context
from stackwise.model.norm import RMSNorm
from stackwise.model.rope import Rope, rotary_table, rotate


class LatentProjections(nn.Module):
    """Queries, keys and values through low-rank latents (DeepSeek-V2, equations 9-18).

    A head has `nope_dim` dimensions without position and, behind them, `rope_dim` rotary ones; all heads share one
    rotary key. The latents pass an RMSNorm each. YaRN's factor, which the rotary table carries, applies to the whole of
    a query and a key (Peng et al. 2023, equation 22).
    """

    def __init__(self, params: ModelParams, n_kv_heads: int) -> None:
        """
        Args:
            params: the architecture.
            n_kv_heads: heads of keys and values, a divisor of `n_heads`.
        """
        super().__init__()
        attention = params.attention
        assert attention.mla_rkv is not None, "the validation of params.yaml asks for it"
        width = attention.head_dim or params.d_model // attention.n_heads
        self.n_heads, self.n_kv_heads = attention.n_heads, n_kv_heads
        self.rope_dim = attention.rope_dim(width)
        self.nope_dim = attention.mla_nope_dim or width - self.rope_dim
        self.qk_dim = self.nope_dim + self.rope_dim
        self.v_dim = attention.mla_v_dim or width
        self.rank = attention.mla_rkv
        self.rope = Rope.of(attention)
        queries = self.n_heads * self.qk_dim
        self.q_proj = self.q_a_proj = self.q_a_norm = self.q_b_proj = None
        if attention.mla_rq is None:
            self.q_proj = nn.Linear(params.d_model, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(params.d_model, attention.mla_rq, bias=False)
            self.q_a_norm = RMSNorm(attention.mla_rq, params.norm_eps)
            self.q_b_proj = nn.Linear(attention.mla_rq, queries, bias=False)
        self.kv_a_proj = nn.Linear(params.d_model, self.rank + self.rope_dim, bias=False)
        self.kv_a_norm = RMSNorm(self.rank, params.norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, n_kv_heads * (self.nope_dim + self.v_dim), bias=False)

    def forward(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[batch, seq, d_model]`, whose first position is `start` (see `rotary_table`) -> queries
        `[batch, n_heads, seq, qk_dim]`, keys `[batch, n_kv_heads, seq, qk_dim]`, values
        `[batch, n_kv_heads, seq, v_dim]`."""
        return self.queries(x, start), *self.keys_values(self.latents(x, start))

    def queries(self, x: Tensor, start: int | Tensor) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, n_heads, seq, qk_dim]`."""
        if self.q_a_proj is not None and self.q_a_norm is not None and self.q_b_proj is not None:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        else:
            assert self.q_proj is not None
            q = self.q_proj(x)
        q = q.view(*x.shape[:2], self.n_heads, self.qk_dim).transpose(1, 2)
        nope, rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        return torch.cat((self.amplified(nope), self._rotate(rope, start)), dim=-1)

    def latents(self, x: Tensor, start: int | Tensor) -> Tensor:
        """`[batch, seq, d_model]` -> normed latents with the rotary key behind them `[batch, seq, rank + rope_dim]`."""
        latent, key = self.kv_a_proj(x).split((self.rank, self.rope_dim), dim=-1)
        return torch.cat((self.kv_a_norm(latent), self._rotate(key[:, None], start)[:, 0]), dim=-1)

    def keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What `latents` returned, of any positions -> their keys `[batch, n_kv_heads, seq, qk_dim]` and values
        `[batch, n_kv_heads, seq, v_dim]`."""
        batch, seq, _ = latents.shape
        latent, rope = latents.split((self.rank, self.rope_dim), dim=-1)
        up = self.kv_b_proj(latent).view(batch, seq, self.n_kv_heads, self.nope_dim + self.v_dim).transpose(1, 2)
        nope, v = up.split((self.nope_dim, self.v_dim), dim=-1)
        rope = rope[:, None].expand(-1, self.n_kv_heads, -1, -1).to(nope.dtype)
        return torch.cat((self.amplified(nope), rope), dim=-1), v

    def amplified(self, nope: Tensor) -> Tensor:
        """Dimensions without position, by the factor that the rotary ones get from their table."""
        return nope if self.rope.amplitude == 1.0 else nope * self.rope.amplitude

    def _rotate(self, x: Tensor, start: int | Tensor) -> Tensor:
        return rotate(x, *rotary_table(start, x.shape[-2], self.rope_dim, self.rope, x.device))


class LatentCache:
    """Latents and rotary keys of the positions seen so far: `rank + rope_dim` numbers each, whatever the number of
    heads."""

    def __init__(self, latents: Tensor) -> None:
        """
        Args:
            latents: memory `[batch, capacity, rank + rope_dim]`.
        """
        self.length = 0
        self._latents = latents

    def extend(self, latents: Tensor) -> Tensor:
        """Add `latents` `[batch, seq, rank + rope_dim]`; returns those of all positions seen."""
        start, self.length = self.length, self.length + latents.shape[1]
        self._latents[:, start : self.length] = latents
        return self._latents[:, : self.length]

    def bytes(self) -> int:
        """Memory that it takes."""
        return self._latents.nbytes


class LatentAttention(nn.Module):
    """Attention type `mla`: DeepSeek-V2's latent attention. The same weights serve bidirectional and causal use."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.dropout = params.attention.dropout
        self.projections = LatentProjections(params, params.attention.n_heads)
        self.o_proj = nn.Linear(params.attention.n_heads * self.projections.v_dim, params.d_model, bias=False)

    def forward(self, x: Tensor, context: Context, cache: LatentCache | None = None) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`; see `parts.Attention`."""
        batch, seq, _ = x.shape
        dropout = self.dropout if self.training else 0.0
        start = context.start(cache.length if cache else 0)
        q, latents = (part(x, start) for part in (self.projections.queries, self.projections.latents))
        if cache:
            latents = cache.extend(latents)
        # Absorption needs the very matrix, which an adapted or quantized projection does not have.
        if cache and seq == 1 and type(self.projections.kv_b_proj) is nn.Linear:
            mixed = self._mix_latents(q, latents, context, dropout)
        else:
            mixed = attend(q, *self.projections.keys_values(latents), context, dropout=dropout)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))

    def _mix_latents(self, q: Tensor, latents: Tensor, context: Context, dropout: float) -> Tensor:
        """Attention of the last position to all, in the space of the latents: one key-value head for all queries.

        `q . (W_k c) = (W_k^T q) . c` and `sum_j p_j (W_v c_j) = W_v sum_j p_j c_j` (DeepSeek-V2, section 2.1.2): no
        position's keys and values are ever made.

        Args:
            q: `[batch, n_heads, 1, qk_dim]`.
            latents: of m positions `[batch, m, rank + rope_dim]`.
            context: segments of the m positions.
            dropout: share of the weights that is dropped.

        Returns:
            `[batch, n_heads, 1, v_dim]`.
        """
        p, m = self.projections, latents.shape[1]
        w_k, w_v = p.kv_b_proj.weight.view(p.n_heads, p.nope_dim + p.v_dim, p.rank).split((p.nope_dim, p.v_dim), dim=1)
        nope, rope = q[:, :, 0].split((p.nope_dim, p.rope_dim), dim=-1)
        absorbed = p.amplified(torch.einsum("bhd,hdr->bhr", nope, w_k))
        mixed = F.scaled_dot_product_attention(
            torch.cat((absorbed, rope.to(absorbed.dtype)), dim=-1)[:, None],
            latents[:, None],
            latents[:, None, :, : p.rank],
            attn_mask=context.allowed(1, m),
            dropout_p=dropout,
            scale=p.qk_dim**-0.5,
        )
        return torch.einsum("bhr,hdr->bhd", mixed[:, 0], w_v)[:, :, None]

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LatentCache:
        """An empty cache for up to `capacity` positions."""
        p = self.projections
        return LatentCache(torch.empty(batch, capacity, p.rank + p.rope_dim, device=device, dtype=dtype))
