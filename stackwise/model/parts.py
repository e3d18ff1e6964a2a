"""What the variants of a block's parts have in common, and which is built."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stackwise.config.model import ModelParams
from stackwise.model.context import Context
from stackwise.variants import class_of


class DecodingCache(Protocol):
    """What one block keeps of the positions it has seen."""

    length: int
    """Number of positions seen."""

    def bytes(self) -> int:
        """Memory that it takes."""
        ...


class Attention(Protocol):
    """What every variant is: a module built from `ModelParams`."""

    def __call__(self, x: Tensor, context: Context, cache: Any = None) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`.

        With `cache` (of `new_cache`) `x` continues what the cache has seen, attention is causal, and the cache then has
        seen `x` too.
        """
        ...

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> DecodingCache:
        """An empty cache for up to `capacity` positions."""
        ...


def build_attention(params: ModelParams) -> nn.Module:
    """The attention of one block."""
    built: nn.Module = class_of("attention", params.attention.type)(params)
    return built


def build_mlp(params: ModelParams) -> nn.Module:
    """The feed-forward network of one block: a module built from `ModelParams` that maps `[batch, seq, d_model]` to the
    same. One that wants a loss of its own keeps it as `balance_loss` (scalar) after a pass in training mode."""
    built: nn.Module = class_of("mlp", params.mlp.type)(params)
    return built
