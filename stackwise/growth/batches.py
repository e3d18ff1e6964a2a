"""What each training step of a window that reads tokens sees: a pure function of the step's number."""

from dataclasses import dataclass

import numpy as np
import torch

from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.growth.window import Batch
from stackwise.objectives.targets import Objective


@dataclass(frozen=True)
class TokenBatches:
    """Batches for a window that reads tokens; masks are fresh in each pass over the data."""

    tokens: TokenDataset
    order: SampleOrder
    objective: Objective
    batch_size: int
    accumulate: int

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of a step (from 0)."""
        samples, epochs = self.order.at(step * self.batch_size, self.batch_size)
        batches = []
        for part in np.split(np.arange(self.batch_size), self.accumulate):
            inputs, targets = self.objective(self.tokens.samples(samples[part]), samples[part], epochs[part])
            batches.append(Batch(torch.from_numpy(inputs), targets))
        return batches
