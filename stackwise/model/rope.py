"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-split layout of Llama checkpoints."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rotary_table(seq: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `position * theta^(-2i / head_dim)`.

    Returns:
        Two fp32 tensors `[seq, head_dim]`, each frequency standing in both halves.
    """
    # The table outlives the call: one made by an evaluation must serve training as well.
    with torch.inference_mode(False):
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
        angles = torch.outer(torch.arange(seq, dtype=torch.float32, device=device), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of `x` by its position's angle.

    Args:
        x: queries or keys `[batch, heads, seq, head_dim]`.
        cos, sin: from `rotary_table`, `[seq, head_dim]`.
    """
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-high, low), dim=-1) * sin.to(x.dtype)
