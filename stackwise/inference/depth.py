"""A rack that stops after stack k: what goes into its head then, and what that costs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stackwise.model.context import Context
from stackwise.model.rack import Rack
from stackwise.precision.dtypes import autocast

_TRIALS = 3


def boundaries(
    rack: Rack, tokens: Tensor, *, causal: bool, times: Tensor | None = None, segments: Tensor | None = None
) -> Iterator[Tensor]:
    """Token ids `[batch, seq]` -> boundaries 0 to K, `[batch, seq, d_model]` each; each is computed when it is asked
    for. The last is what `rack` returns; arguments are those of `Rack.forward`."""
    context = Context(causal=causal, segments=segments, times=times)
    x = rack.embeddings(tokens)
    yield x
    for stack in rack.stacks:
        x = stack(x, context)
        yield x


@dataclass(frozen=True)
class DepthCost:
    """What it takes to read a text and predict each of its tokens from one boundary."""

    operations: float
    """Floating-point operations a token (2 for a multiplication with an addition) of matrix products and attention."""
    seconds: float
    """A sample, in a batch. Differs from run to run: it belongs in no artifact."""


@torch.inference_mode()
def costs(rack: Rack, tokens: Tensor, *, causal: bool, dtype: str) -> list[DepthCost]:
    """Of boundaries 0 to K.

    Args:
        rack: the model.
        tokens: a batch of ids on its device `[batch, seq]`.
        causal: whether a position may only look back.
        dtype: of matrix products.
    """
    times = torch.zeros(len(tokens), device=tokens.device)
    found = []
    with autocast(tokens.device, dtype):
        for depth in range(len(rack.stacks) + 1):
            with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
                _read(rack, tokens[:1], depth, causal, times[:1])
            seconds = min(_seconds(rack, tokens, depth, causal, times) for _ in range(_TRIALS))
            found.append(DepthCost(counter.get_total_flops() / tokens.shape[1], seconds / len(tokens)))
    return found


def _read(rack: Rack, tokens: Tensor, depth: int, causal: bool, times: Tensor) -> None:
    for k, x in enumerate(boundaries(rack, tokens, causal=causal, times=times)):
        if k == depth:
            rack.head(x)
            return


def _seconds(rack: Rack, tokens: Tensor, depth: int, causal: bool, times: Tensor) -> float:
    began = time.perf_counter()
    _read(rack, tokens, depth, causal, times)
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""The fused attention of CPUs, which PyTorch's counter does not know."""
