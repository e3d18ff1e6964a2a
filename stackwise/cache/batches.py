"""What each training step of a window above a cached boundary sees: a pure function of the step's number."""

from dataclasses import dataclass

import numpy as np

from stackwise.cache.boundary import BoundaryReader
from stackwise.growth.batches import TokenBatches
from stackwise.growth.window import Batch


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
            rows = variants[part] * len(base.tokens) + samples[part]
            batches.append(base.batch(samples[part], variants[part], self.boundary.read(rows, verify=verify)))
        return batches
