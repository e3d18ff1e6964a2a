"""Section `objective`: mask-diffusion while pretraining."""

from typing import Literal

from pydantic import Field

from stackwise.config.section import Section


class ObjectiveParams(Section):
    """Mask-diffusion: which share of the tokens is masked, how the loss is weighted."""

    mask_min: float = Field(default=0.15, gt=0, le=1)
    """Smallest mask rate t; at most `mask_max`."""
    mask_max: float = Field(default=0.9, gt=0, le=1)
    """Largest mask rate t."""
    distribution: Literal["uniform", "cosine"] = "uniform"
    """Distribution of t over the range: `uniform`, or `cosine`, which favours high rates."""
    count: Literal["bernoulli", "exact"] = "bernoulli"
    """`bernoulli`: each token is masked with probability t. `exact`: round(t * seq_len) tokens are masked."""
    weighting: Literal["plain", "nelbo"] = "plain"
    """Weight of a masked token's cross-entropy: 1 (`plain`) or 1/t (`nelbo`)."""
    variants: int = Field(default=4, ge=1)
    """Mask variants of each sample in the cached activations; epochs revisit them in turn."""

    def problems(self) -> list[tuple[str, str]]:
        """A range that is none."""
        if self.mask_min > self.mask_max:
            return [("mask_min", f"expected at most objective.mask_max ({self.mask_max})")]
        return []
