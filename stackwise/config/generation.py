"""Section `samples`: how text is made, and which texts the report shows."""

from typing import Literal

from pydantic import Field

from stackwise.config.section import Section

CAUSAL_ONLY = ("repetition_penalty",)
"""The keys that mean something to models that write from left to right, and to no others."""
UNMASKING_ONLY = ("sampler", "steps", "block")
"""The keys that mean something to models that unmask, and to no others."""


class GenerationParams(Section):
    """How text is made."""

    new_tokens: int | None = Field(default=None, ge=1)
    """Tokens behind the prompt: at most so many from left to right, just so many by unmasking. Null: as many as the
    model's samples have room for; none, if the prompt has a [MASK]."""
    temperature: float = Field(default=1.0, ge=0)
    """What the logits are divided by (0: always the likeliest token)."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw from the so many likeliest tokens (null: from all)."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw from the fewest likeliest tokens whose probabilities add up to this (null: from all)."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """What the logits of tokens that have occurred are divided by if positive, multiplied by if negative (1: none).
    From left to right only."""
    stop: list[str] = Field(default=[])
    """Texts before which a continuation ends."""
    ends: bool = True
    """Whether a continuation ends where the model puts the end of a text."""
    sampler: Literal["ancestral", "confidence"] = "ancestral"
    """Which masked tokens are revealed in a step: `ancestral`, chosen by chance, or `confidence`, those of which the
    model is surest."""
    steps: int = Field(default=64, ge=1)
    """Steps in which a text is unmasked."""
    block: int | None = Field(default=None, ge=1)
    """Unmask blocks of so many tokens, one after the other from left to right (null: all at once)."""

    def problems(self) -> list[tuple[str, str]]:
        """Texts that are everywhere."""
        return [("stop", "expected texts of at least one character")] if "" in self.stop else []


class SamplesParams(GenerationParams):
    """The texts that each model writes for the report."""

    prompts: list[str] = Field(default=[""])
    """What the texts begin with, or, with a [MASK] in it, what they fill in, which models that write from left to right
    leave out. An empty prompt: the whole text is the model's."""
    number: int = Field(default=4, ge=1)
    """Texts for each prompt."""
    temperature: float = Field(default=0.8, ge=0)
    """What the logits are divided by (0: always the likeliest token)."""
    ends: bool = False
    """Whether a continuation ends where the model puts the end of a text."""
    steps: int = Field(default=32, ge=1)
    """Steps in which a text is unmasked."""

    def problems(self) -> list[tuple[str, str]]:
        """No prompts."""
        found = super().problems()
        return found if self.prompts else [*found, ("prompts", 'expected at least one; `[""]` is the empty one')]
