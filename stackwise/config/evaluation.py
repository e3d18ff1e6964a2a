"""Section `evaluate`: what is measured on held-out text."""

from pathlib import PurePath
from typing import Annotated

from pydantic import Field

from stackwise.config.section import Section


class ChoicesParams(Section):
    """A file of multiple-choice questions."""

    file: str = Field(min_length=1)
    """JSON Lines: `{"prompt": text, "choices": [text, ...], "answer": place from 0, or one of the choices}`. A choice
    follows the prompt directly, so it begins with its space."""
    draws: int = Field(default=32, ge=1)
    """Masks under which a diffusion model reads a choice; one that has no more masks than that is read under all."""

    @property
    def name(self) -> str:
        """What metrics call it."""
        return PurePath(self.file).stem


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
    choices: list[ChoicesParams] = Field(default=[])
    """Files of multiple-choice questions that every model answers without training for them."""

    scorer: str | None = None
    """The causal model that reads the texts of all models (`fused`, or a branch of `fine_tune`), for their generative
    perplexity. Null: the first there is; where there is none, texts are not scored."""

    def problems(self) -> list[tuple[str, str]]:
        """Rates that do not rise; files that metrics cannot tell apart."""
        found = []
        if not self.mask_rates or sorted(set(self.mask_rates)) != self.mask_rates:
            found.append(("mask_rates", "expected at least one number, each greater than the one before it"))
        names = [own.name for own in self.choices]
        for i, name in enumerate(names):
            if name in names[:i]:
                found.append((f"choices.{i}.file", f"metrics know files by their names: expected one {name!r}"))
        return found
