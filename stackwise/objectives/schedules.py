"""Which share of the tokens is masked: schedules over depth or training, and time steps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackwise.config.objective import Schedule
from stackwise.data.order import SampleOrder


@dataclass(frozen=True)
class MaskScheduler:
    """A mask fraction that goes from a minimum to a maximum."""

    schedule: Schedule
    """`constant`: always the maximum. `linear`: evenly. `exponential`: at a constant ratio. `cosine`: slowly at both
    ends, `(1 - cos(pi p)) / 2` of the way."""
    minimum: float
    maximum: float

    def fraction(self, progress: float) -> float:
        """The mask fraction at `progress`, from 0 (the minimum) to 1 (the maximum).

        Raises:
            ValueError: progress is out of range.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], not {progress}")
        if self.schedule == "constant":
            return self.maximum
        if self.schedule == "exponential":
            return self.minimum * float((self.maximum / self.minimum) ** progress)
        way = float((1 - np.cos(np.pi * progress)) / 2) if self.schedule == "cosine" else progress
        return self.minimum + (self.maximum - self.minimum) * way


@dataclass(frozen=True)
class Curriculum:
    """A mask fraction that follows training: that of a sample in a pass is set by the step that visits it."""

    scheduler: MaskScheduler
    order: SampleOrder
    """In which the samples are visited."""
    batch_size: int
    """Samples per step."""
    steps: int
    """Over which the schedule runs; visits after that have the fraction of the last."""

    def fractions(self, samples: np.ndarray, passes: np.ndarray) -> NDArray[np.float64]:
        """The mask fraction of each sample `[n]` in its pass over the data `[n]`: `[n]`."""
        steps = self.order.place_of(samples, passes) // self.batch_size
        last = self.steps - 1
        return np.array([self.scheduler.fraction(min(step / last, 1.0) if last else 0.0) for step in steps.tolist()])

    def identity(self) -> dict[str, Any]:
        """What determines the fractions, besides the seed, as JSON values."""
        return {
            **asdict(self.scheduler),
            "stream": self.order.stream,
            "batch_size": self.batch_size,
            "steps": self.steps,
        }


class TimeStepMasking:
    """Discrete time steps 0 ... T - 1, each with a mask fraction of its own."""

    def __init__(
        self,
        num_time_steps: int,
        fractions: Sequence[float] | Mapping[str, float] = (),
        *,
        minimum: float,
        maximum: float,
    ) -> None:
        """
        Args:
            num_time_steps: T.
            fractions: of each step; or of some steps, by number, and those between follow linearly, while those before
                the first and after the last have its fraction; none: linear from `minimum` to `maximum`.
            minimum: fraction of step 0 without `fractions`.
            maximum: likewise of step T - 1.

        Raises:
            ValueError: `fractions` does not fit the number of steps.
        """
        steps = np.arange(num_time_steps)
        if not fractions:
            self.fractions = np.linspace(minimum, maximum, num_time_steps)
        elif isinstance(fractions, Mapping):
            known = sorted((int(step), fraction) for step, fraction in fractions.items())
            if not 0 <= known[0][0] <= known[-1][0] < num_time_steps:
                raise ValueError(f"steps must be from 0 to {num_time_steps - 1}")
            self.fractions = np.interp(steps, *np.array(known).T)
        elif len(fractions) == num_time_steps:
            self.fractions = np.array(fractions, dtype=np.float64)
        else:
            raise ValueError(f"{len(fractions)} fractions for {num_time_steps} steps")

    def fraction(self, step: int) -> float:
        """The mask fraction of a step."""
        return float(self.fractions[step])

    def step_at(self, u: float) -> int:
        """The step at quantile `u` in [0, 1): each has the same share."""
        return int(u * len(self.fractions))
