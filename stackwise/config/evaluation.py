"""Section `evaluate`: what is measured on held-out text."""

from typing import Annotated

from pydantic import Field

from stackwise.config.section import Section


class EvaluateParams(Section):
    """What is measured on the validation split."""

    samples: int = Field(default=256, ge=1)
    """Validation samples per figure, spread evenly over the split (all, if there are fewer)."""
    draws: int = Field(default=4, ge=1)
    """Mask draws per sample for the NELBO."""
    batch_size: int = Field(default=32, ge=1)
    """Samples at a time."""
    mask_rates: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.15, 0.3, 0.5, 0.7, 0.9])
    """Mask rates, rising, at which the masked NLL and the accuracy are measured."""

    def problems(self) -> list[tuple[str, str]]:
        """Rates that do not rise."""
        if not self.mask_rates or sorted(set(self.mask_rates)) != self.mask_rates:
            return [("mask_rates", "expected at least one number, each greater than the one before it")]
        return []
