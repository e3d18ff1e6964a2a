"""What each training step sees: a pure function of the step's number."""

from dataclasses import dataclass

import numpy as np
import torch

from stackwise.cache.boundary import BoundaryReader
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


@dataclass(frozen=True)
class BoundaryBatches:
    """Batches for a window above a cached boundary; passes over the data revisit its mask variants in turn."""

    base: TokenBatches
    """The same samples and targets, for a window that reads tokens."""
    boundary: BoundaryReader
    variants: int

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of a step (from 0)."""
        base = self.base
        samples, epochs = base.order.at(step * base.batch_size, base.batch_size)
        variants = epochs % self.variants
        # When all variants have been read once, every checksum has been verified.
        verify = bool(epochs[0] < self.variants)
        batches = []
        for part in np.split(np.arange(base.batch_size), base.accumulate):
            _, targets = base.objective(base.tokens.samples(samples[part]), samples[part], variants[part])
            rows = variants[part] * len(base.tokens) + samples[part]
            batches.append(Batch(self.boundary.read(rows, verify=verify), targets))
        return batches
