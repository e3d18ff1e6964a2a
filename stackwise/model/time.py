"""Time conditioning: an embedding of the mask rate t that modulates every block."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import TimeParams

_FREQUENCY_SCALE = 1000.0
"""t in (0, 1] is stretched by this before the sinusoids, whose wavelengths run from 2 pi to 10,000 * 2 pi."""


class TimeEmbedding(nn.Module):
    """t -> a vector: sinusoids or a learned row per bin, then an MLP of one hidden layer (Peebles & Xie 2023, DiT).

    Every stack has its own, which trains with it and is frozen with it.
    """

    def __init__(self, params: TimeParams) -> None:
        super().__init__()
        self.width, self.bins = params.width, params.bins
        self.table = nn.Embedding(params.bins or 1, params.width) if params.embedding == "learned" else None
        self.hidden = nn.Linear(params.width, params.width)
        self.output = nn.Linear(params.width, params.width)

    def forward(self, times: Tensor) -> Tensor:
        """`[batch]` in [0, 1] -> `[batch, width]`."""
        if self.bins is not None:
            bins = (times * self.bins).ceil().long().clamp(1, self.bins) - 1
            times = (bins + 0.5) / self.bins
        x = self.table(bins) if self.table is not None else self._sinusoids(times)
        return self.output(F.silu(self.hidden(x.to(self.hidden.weight.dtype))))

    def _sinusoids(self, times: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
        angles = _FREQUENCY_SCALE * times.float()[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Modulation(nn.Linear):
    """AdaLN-zero (Peebles & Xie 2023): shift and scale of a block's two normalised inputs, gates of its two outputs.

    Its weights start at zero, so that the gates are closed and the block starts as the identity.
    """

    def __init__(self, width: int, d_model: int) -> None:
        super().__init__(width, 6 * d_model)

    def parts(self, time: Tensor) -> tuple[Tensor, ...]:
        """`[batch, width]` -> shift, scale, gate of the attention, then of the feed-forward network,
        `[batch, 1, d_model]` each."""
        return self(F.silu(time))[:, None, :].chunk(6, dim=-1)
