"""From logits to a token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stackwise.config.generation import GenerationParams


@dataclass(frozen=True)
class Choice:
    """How a token is chosen: the temperature first, then the `top_k` likeliest, of these the nucleus `top_p` (Holtzman
    et al. 2020, The Curious Case of Neural Text Degeneration)."""

    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest."""
    top_k: int | None = None
    top_p: float | None = None
    """The fewest likeliest tokens that have at least this probability together."""

    @classmethod
    def of(cls, params: GenerationParams) -> "Choice":
        """What the parameters describe."""
        return cls(params.temperature, params.top_k, params.top_p)

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """A token for each row, a pure function of both.

        Args:
            logits: `[n, vocab]`.
            uniforms: `[n]` fp64, drawn from [0, 1); where they fall in the cumulated probabilities, there is the token.

        Returns:
            `[n]` int64.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        ids = None
        scaled = logits / self.temperature
        if self.top_k is not None or self.top_p is not None:
            # Few numbers first: what follows works on these alone, from the likeliest down.
            scaled, ids = scaled.topk(min(self.top_k or scaled.shape[-1], scaled.shape[-1]), dim=-1)
        probabilities = scaled.softmax(dim=-1, dtype=torch.float32)
        sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
        if self.top_p is not None:
            likelier = sums - probabilities  # what those before have together; the first has none before it
            sums = probabilities.masked_fill(likelier >= self.top_p, 0.0).cumsum(dim=-1, dtype=torch.float64)
        # The first whose sum is above: a token of no probability never is, for its sum is that of the one before.
        places = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True).clamp_(max=sums.shape[-1] - 1)
        return (places if ids is None else ids.gather(1, places))[:, 0]


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits `[n, vocab]` in which tokens that have occurred (`seen`, `[n, vocab]` bool) are less likely: divided by
    `penalty` if positive, multiplied if negative (Keskar et al. 2019, CTRL, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
