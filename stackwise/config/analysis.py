"""Section `analyse`: what is looked at inside the trained rack."""

from typing import Annotated

from pydantic import Field

from stackwise.config.section import Section


class AnalyseParams(Section):
    """What the stage `analyse` reads of the fused rack and of the first causal model made of it."""

    samples: int = Field(default=32, ge=1)
    """Validation samples, spread evenly over the split (all, if there are fewer)."""
    mask_rates: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.15, 0.5, 0.9])
    """Mask rates, rising, under which a bidirectional model is read."""
    tokens: int = Field(default=20, ge=2)
    """Tokens of the text that the figures of the logit lens and of attention show."""
    heads: int = Field(default=4, ge=1)
    """Attention maps shown of each model, those of least entropy in as many layers, spread over the depth."""

    def problems(self) -> list[tuple[str, str]]:
        """Rates that do not rise."""
        if not self.mask_rates or sorted(set(self.mask_rates)) != self.mask_rates:
            return [("mask_rates", "expected at least one number, each greater than the one before it")]
        return []
