"""Who looks at whom: the weights of softmax attention, which no pass through a rack ever makes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.model.context import Context
from stackwise.model.rack import Rack


def attention_weights(attention: nn.Module, x: Tensor, context: Context) -> tuple[Tensor, Tensor] | None:
    """The weights of a layer, and the values that it mixes by them.

    They are computed from the layer's own queries and keys, once more beside it: fused kernels keep none. Attention by
    kernels (`kernel`, `mlgka`) is a quotient of sums over features whose weights may be negative: it has no such map.

    Args:
        attention: of a block.
        x: what goes into it `[batch, seq, d_model]`.
        context: of the pass.

    Returns:
        Weights `[batch, n_heads, seq, seq]` whose rows sum to 1, values `[batch, n_heads, seq, v_dim]`, both fp32; None
        for attention by kernels.
    """
    if hasattr(attention, "features"):
        return None
    own: Any = attention
    project = own.projections if hasattr(own, "projections") else own.queries_keys_values
    q, k, v = project(x, context.start(0))
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1).float() for part in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = context.allowed(x.shape[1], x.shape[1])
    if visible is None and context.causal:
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1), v


@contextmanager
def watched(rack: Rack, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """In the block, every pass through the rack shows `see` the number of each layer, from the bottom, and its weights
    `[batch, n_heads, seq, seq]`; layers without any are left out."""

    def watch(layer: int) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if (found := attention_weights(module, arguments[0], arguments[1])) is not None:
                see(layer, found[0])

        return before

    layers = [block for stack in rack.stacks for block in stack.blocks]  # type: ignore[union-attr]
    with ExitStack() as hooks:
        for layer, block in enumerate(layers):
            hooks.enter_context(_removed(block.attention.register_forward_pre_hook(watch(layer))))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def entropy(weights: Tensor) -> Tensor:
    """Of each query's attention, in bits: 0 where it looks at one token, log2(n) where at n alike.

    Args:
        weights: `[..., seq, seq]`.

    Returns:
        `[..., seq]`.
    """
    return torch.special.entr(weights).sum(-1) / torch.log(torch.tensor(2.0))


def distance(weights: Tensor) -> Tensor:
    """How many tokens away, on average, each query looks.

    Args:
        weights: `[..., seq, seq]`.

    Returns:
        `[..., seq]`.
    """
    places = torch.arange(weights.shape[-1], device=weights.device)
    return (weights * (places[:, None] - places).abs()).sum(-1)


def uniform(seq: int, *, causal: bool) -> Tensor:
    """The weights of a head that looks at all that it sees alike `[seq, seq]`: what entropy and distance are compared
    with."""
    visible = torch.ones(seq, seq)
    if causal:
        visible = visible.tril()
    return visible / visible.sum(-1, keepdim=True)
