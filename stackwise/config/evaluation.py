"""Sections `evaluate` and `report`: what is measured on held-out text and shown."""

from pydantic import Field, field_validator

from stackwise.config.section import Section


class EvaluateParams(Section):
    """What is measured on the validation split."""

    samples: int = Field(default=256, ge=1)
    """Validation samples per figure, spread evenly over the split (all, if there are fewer)."""
    draws: int = Field(default=4, ge=1)
    """Mask draws per sample for the NELBO."""
    batch_size: int = Field(default=32, ge=1)
    """Samples at a time."""
    mask_rates: list[float] = [0.15, 0.3, 0.5, 0.7, 0.9]
    """Mask rates at which the masked NLL and the accuracy are measured."""

    @field_validator("mask_rates")
    @classmethod
    def _rates(cls, rates: list[float]) -> list[float]:
        if not rates or any(not 0 < r <= 1 for r in rates) or sorted(set(rates)) != rates:
            raise ValueError("expected rising numbers in (0, 1]")
        return rates


class ReportParams(Section):
    """The samples of text in the report."""

    samples: int = Field(default=4, ge=1)
    """Texts sampled from each model."""
    steps: int = Field(default=32, ge=1)
    """Denoising steps of a text from a diffusion model."""
    temperature: float = Field(default=0.8, gt=0)
    """Softmax temperature."""
