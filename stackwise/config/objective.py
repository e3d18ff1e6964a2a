"""Section `objective`: what the stacks learn while pretraining, and what is masked."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from stackwise.config.section import Section

Schedule = Literal["constant", "linear", "exponential", "cosine"]
Fraction = Annotated[float, Field(gt=0, le=1)]

MASKED = ("diffusion", "mlm")
"""The types that hide tokens."""
MASKING = (
    *("mask_min", "mask_max", "distribution", "count", "variants", "masks", "pool_size", "unit"),
    *("num_time_steps", "time_step_fractions", "schedule", "schedule_over", "schedule_stacks"),
)
"""The keys that say what is masked."""
_DRAWN = ("distribution", "num_time_steps", "time_step_fractions")


def _one_error(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One error for what is neither a list nor a mapping of fractions, where pydantic would find two and more."""
    try:
        return validate(value)
    except ValidationError:
        raise PydanticCustomError("fractions", "neither a list nor a mapping of fractions") from None


class ObjectiveParams(Section):
    """What the stacks learn while pretraining: which share of the tokens is masked, how the loss is weighted."""

    type: Literal["diffusion", "mlm", "clm", "custom"] = "diffusion"
    """What is predicted. `diffusion`: the masked tokens, each for a share of all tokens. `mlm`: likewise, but the loss
    is their mean, and some may show a random token or themselves. `clm`: every next token, with causal attention.
    `custom`: the labels in `data.labels_column`."""
    mask_min: float = Field(default=0.15, gt=0, le=1)
    """Smallest mask rate t; at most `mask_max`."""
    mask_max: float = Field(default=0.9, gt=0, le=1)
    """Largest mask rate t."""
    distribution: Literal["uniform", "cosine"] = "uniform"
    """Distribution of t over the range: `uniform`, or `cosine`, which favours high rates."""
    num_time_steps: int | None = Field(default=None, ge=1)
    """Draw one of so many time steps, each with a mask rate of its own (null: t is continuous)."""
    time_step_fractions: Annotated[list[Fraction] | dict[str, Fraction], WrapValidator(_one_error)] = Field(default=[])
    """Mask rate of every time step from 0, or of some (`{0: 0.1, 99: 0.9}`), with those between on straight lines.
    `[]`: on a line from `mask_min` to `mask_max`."""
    schedule: Schedule | None = None
    """A mask rate that is not drawn but goes from `mask_min` to `mask_max`: evenly (`linear`), at a constant ratio
    (`exponential`), slowly at both ends (`cosine`); or is `mask_max` throughout (`constant`). Null: t is drawn."""
    schedule_over: Literal["depth", "training"] = "depth"
    """`depth`: from the lowest stack to the highest, each with a mask rate of its own. `training`: over the steps of
    whatever trains. Racks that train as a whole draw t where a schedule runs over depth."""
    schedule_stacks: int | None = Field(default=None, ge=1)
    """Number of stacks over which the mask rate goes by depth, at least `n_stacks` (null: `n_stacks`; then another
    `n_stacks` changes the rate of every stack, and all train again)."""
    count: Literal["bernoulli", "exact"] = "bernoulli"
    """`bernoulli`: each token (or word) is masked with probability t. `exact`: round(t * seq_len) tokens are masked, or
    as many words as come nearest to that."""
    unit: Literal["token", "word"] = "token"
    """What is masked: single tokens, or whole words (letters and digits with what stands before them)."""
    masks: Literal["fresh", "fixed", "pool"] = "fresh"
    """`fresh`: new ones in each pass over the data where tokens are read. `fixed`: `variants` for each sample
    everywhere, as in the cached activations. `pool`: likewise, out of `pool_size` patterns that all samples share."""
    pool_size: int | None = Field(default=None, ge=1)
    """Number of mask patterns in the pool (`masks` pool)."""
    variants: int = Field(default=4, ge=1)
    """Mask variants of each sample in the cached activations; epochs revisit them in turn."""
    random_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the masked tokens that show a random token instead of the mask (type `mlm`; BERT: 0.1)."""
    keep_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the masked tokens that show themselves (type `mlm`; BERT: 0.1)."""
    weighting: Literal["plain", "nelbo"] = "plain"
    """Weight of a masked token's cross-entropy: 1 (`plain`) or 1/t (`nelbo`; type `diffusion`)."""
    embedding_weight: float = Field(default=0.0, ge=0)
    """Weight of a denoising term in embedding space: the squared distance between the normalised features below the
    head and the normalised input embedding of each masked token (types `diffusion`, `mlm`)."""
    causal: bool = False
    """Whether a position may only look back (type `custom`; `clm` always does)."""

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the type, or each other."""
        found = []
        if self.mask_min > self.mask_max:
            found.append(("mask_min", f"expected at most objective.mask_max ({self.mask_max})"))
        found += self._type_problems()
        found += self._time_step_problems()
        found += self._schedule_problems()
        found += self._pool_problems()
        return found

    @property
    def looks_back(self) -> bool:
        """Whether a position sees only itself and those before it."""
        return self.type == "clm" or self.causal

    @property
    def by_training(self) -> bool:
        """Whether the mask rate follows training."""
        return self.schedule is not None and self.schedule_over == "training"

    @property
    def by_depth(self) -> bool:
        """Whether each stack has a mask rate of its own by a schedule."""
        return self.schedule is not None and self.schedule_over == "depth"

    def _type_problems(self) -> list[tuple[str, str]]:
        users = {
            "weighting": ("diffusion",),
            "embedding_weight": MASKED,
            "random_share": ("mlm",),
            "keep_share": ("mlm",),
            "causal": ("custom",),
        }
        found = [
            (key, f"has no effect with objective.type {self.type} (it has with {', '.join(types)}): leave it out")
            for key, types in users.items()
            if self.type not in types and self.changed([key])
        ]
        if self.random_share + self.keep_share > 1:
            found.append(("keep_share", f"expected at most {1 - self.random_share:g}, what random_share leaves"))
        return found

    def _time_step_problems(self) -> list[tuple[str, str]]:
        steps, fractions = self.num_time_steps, self.time_step_fractions
        if steps is None:
            without = "has no effect without objective.num_time_steps: give the number of steps or leave it out"
            return [("time_step_fractions", without)] if fractions else []
        found = []
        if isinstance(fractions, dict):
            if not all(key.isdecimal() and int(key) < steps for key in fractions):
                found.append(("time_step_fractions", f"expected steps from 0 to {steps - 1} as keys"))
            elif len({int(key) for key in fractions}) < len(fractions):
                found.append(("time_step_fractions", "expected each step once"))
        elif fractions and len(fractions) != steps:
            message = f"expected {steps} fractions, one for each of objective.num_time_steps, not {len(fractions)}"
            found.append(("time_step_fractions", message))
        if fractions:
            found += [
                (key, "has no effect with objective.time_step_fractions: leave it out")
                for key in self.changed(("mask_min", "mask_max"))
            ]
        return found

    def _schedule_problems(self) -> list[tuple[str, str]]:
        if self.schedule is not None:
            return [
                (key, "has no effect with objective.schedule, which sets the mask rate: leave one of them out")
                for key in self.changed(_DRAWN)
            ]
        message = "has no effect without objective.schedule: name a schedule or leave it out"
        return [(key, message) for key in self.changed(("schedule_over",))]

    def _pool_problems(self) -> list[tuple[str, str]]:
        if self.masks != "pool":
            message = f"has no effect with objective.masks {self.masks} (it has with pool): leave it out"
            return [("pool_size", message)] if self.pool_size is not None else []
        found = []
        if self.pool_size is None:
            found.append(("pool_size", "expected a number, because objective.masks is pool"))
        if self.unit == "word":
            found.append(("unit", "cannot be word with objective.masks pool: words differ from sample to sample"))
        if self.by_training:
            message = "cannot be training with objective.masks pool, whose patterns keep their mask rates"
            found.append(("schedule_over", message))
        return found
