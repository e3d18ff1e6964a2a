"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-split layout of Llama checkpoints."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackwise.config.model import AttentionParams

_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
"""Wavelengths above `original_len / low` are stretched, those below `original_len / high` are not."""
_YARN_FAST, _YARN_SLOW = 32.0, 1.0
"""Frequencies that turn more than `fast` times over the original length are kept, those below `slow` stretched."""


@dataclass(frozen=True)
class Rope:
    """Which frequencies turn which pair."""

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_len: int = 1

    @classmethod
    def of(cls, params: AttentionParams) -> "Rope":
        """What the parameters describe."""
        return cls(params.rope_theta, params.rope_scaling, params.rope_factor or 1.0, params.rope_original_len or 1)

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        """Angles per position, `theta^(-2i / dim)` before scaling: `[dim / 2]` fp32.

        `linear`: all divided by `factor` (Chen et al. 2023). `yarn`: high frequencies kept, low ones divided, a ramp
        between (Peng et al. 2023, section 3.2). `llama3`: likewise by wavelength (Llama 3.1).
        """
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        base = 1.0 / (self.theta**exponents)
        match self.scaling:
            case "linear":
                return base / self.factor
            case "yarn":
                low, high = (self._dimension_that_turns(times, dim) for times in (_YARN_FAST, _YARN_SLOW))
                low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
                places = torch.arange(dim // 2, dtype=torch.float32, device=device)
                stretched = ((places - low) / max(high - low, 1e-3)).clamp(0, 1)
                return base / self.factor * stretched + base * (1 - stretched)
            case "llama3":
                turns = self.original_len * base / (2 * math.pi)
                kept = ((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)).clamp(0, 1)
                return base / self.factor * (1 - kept) + base * kept
        return base

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines: `0.1 ln(factor) + 1` for `yarn` (Peng et al. 2023, equation 22), else 1."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" else 1.0

    def _dimension_that_turns(self, times: float, dim: int) -> float:
        return dim * math.log(self.original_len / (times * 2 * math.pi)) / (2 * math.log(self.theta))


@lru_cache(maxsize=8)
def _table(end: int, dim: int, rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    # The table outlives the call: one made by an evaluation must serve training as well.
    with torch.inference_mode(False):
        positions = torch.arange(end, dtype=torch.float32, device=device)
        angles = torch.outer(positions, rope.frequencies(dim, device)).repeat(1, 2)
        return angles.cos() * rope.amplitude, angles.sin() * rope.amplitude


def rotary_table(start: int | Tensor, seq: int, dim: int, rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions `start ... start + seq - 1`.

    Args:
        start: of all samples, or of each `[batch]` int64; those in front of position 0 are padding, and any will do.
        seq, dim, rope, device: as their names say.

    Returns:
        Two fp32 tensors `[seq, dim]`, each frequency standing in both halves; `[batch, 1, seq, dim]` if samples differ.
    """
    if isinstance(start, Tensor):
        positions = (start[:, None, None] + torch.arange(seq, device=device)).clamp_(min=0)
        cos, sin = _table(1 << int(positions.max()).bit_length(), dim, rope, device)
        return cos[positions], sin[positions]
    end = start + seq
    if start:  # decoding: a table that serves the next positions too
        end = 1 << (end - 1).bit_length()
    cos, sin = _table(end, dim, rope, device)
    return cos[start : start + seq], sin[start : start + seq]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + dim / 2) of `x` by its position's angle.

    Args:
        x: queries or keys `[batch, heads, seq, dim]`.
        cos, sin: from `rotary_table`, `[seq, dim]` or `[batch, 1, seq, dim]`.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if not torch.is_grad_enabled():  # the same numbers, without what the gradient takes
        return _turned(x, cos, sin, sign=1)
    return _Turn.apply(x, cos, sin)


class _Turn(torch.autograd.Function):
    """`rotate`, written by hand because its gradient is the same with angles of the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `rotate`, all of one dtype."""
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of `x`."""
        return _turned(grad, *ctx.saved_tensors, sign=-1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    (low, high), (sin, _) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    turned = x * cos
    turned_low, turned_high = turned.chunk(2, dim=-1)
    turned_low.addcmul_(high, sin, value=-sign)
    turned_high.addcmul_(low, sin, value=sign)
    return turned
