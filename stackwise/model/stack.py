"""Block and Stack: the residual stream goes in and comes out."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackwise.config.model import ModelParams
from stackwise.model.context import Context
from stackwise.model.norm import RMSNorm
from stackwise.model.parts import DecodingCache, build_attention, build_mlp
from stackwise.model.time import Modulation, TimeEmbedding


class Block(nn.Module):
    """One pre-norm transformer layer (Touvron et al. 2023, Llama); with time conditioning AdaLN-zero at its two norms.

    Adapters belong on the projections of `attention` and `mlp`.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(params.d_model, params.norm_eps)
        self.attention = build_attention(params)
        self.mlp_norm = RMSNorm(params.d_model, params.norm_eps)
        self.mlp = build_mlp(params)
        timed = params.time.mode == "input"
        self.modulation = Modulation(params.time.width, params.d_model) if timed else None

    def forward(
        self, x: Tensor, context: Context | None = None, *, time: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`.

        Args:
            x: the residual stream.
            context: what all blocks share; bidirectional without segments if None.
            time: embedding of the mask rate `[batch, width]`, for a block with time conditioning.
            cache: the block's decoding cache.
        """
        context = context or Context()
        if self.modulation is None:
            x = x + self.attention(self.attention_norm(x), context, cache)
            return x + self.mlp(self.mlp_norm(x))
        assert time is not None, "a block with time conditioning needs the embedding of t"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation.parts(time)
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, context, cache)
        return x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)


class Stack(nn.Module):
    """A few consecutive blocks: the unit of training. Maps boundary k to boundary k + 1."""

    def __init__(self, params: ModelParams, n_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(params) for _ in range(n_blocks))
        self.time = TimeEmbedding(params.time) if params.time.mode == "input" else None
        self.checkpointing = False
        """Keep only what goes into each block for the backward pass, which computes the rest again (Chen et al. 2016,
        Training Deep Nets with Sublinear Memory Cost)."""

    def forward(self, x: Tensor, context: Context | None = None, *, cache: list[DecodingCache] | None = None) -> Tensor:
        """Boundary k `[batch, seq, d_model]` -> boundary k + 1 `[batch, seq, d_model]`.

        Args:
            x: the residual stream.
            context: what all blocks share; bidirectional without segments if None.
            cache: a decoding cache for each block, from `new_cache`.
        """
        context = context or Context()
        time = None
        if self.time is not None:
            # Text without masks, as causal models see it, has t = 0.
            times = x.new_zeros(len(x), dtype=torch.float32) if context.times is None else context.times
            time = self.time(times)
        recompute = self.checkpointing and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, context, time=time, use_reentrant=False, **_around(block.mlp))
            else:
                x = block(x, context, time=time, cache=cache[i] if cache else None)
        return x

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> list[DecodingCache]:
        """Empty decoding caches of all blocks for up to `capacity` positions."""
        return [block.attention.new_cache(batch, capacity, device, dtype) for block in self.blocks]  # type: ignore[operator, union-attr]


def _around(mlp: Any) -> dict[str, Any]:
    """What `checkpoint` is to put around the two passes through a block; nothing, if need be: it cannot be compiled."""
    if not hasattr(mlp, "balance_loss"):
        return {}
    return {"context_fn": lambda: (nullcontext(), _balance_loss_kept(mlp))}


@contextmanager
def _balance_loss_kept(mlp: Any) -> Iterator[None]:
    """The loss that the first pass has left is the one that counts; the second's would keep a block's activations."""
    kept = mlp.balance_loss
    try:
        yield
    finally:  # also if the pass ends early, when all that is wanted is there
        mlp.balance_loss = kept
