"""What each training step of a window that reads tokens sees: a pure function of the step's number."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.growth.window import Batch
from stackwise.model.context import segments_of_documents
from stackwise.objectives.targets import Objective


@dataclass(frozen=True)
class TokenBatches:
    """Batches for a window that reads tokens."""

    tokens: TokenDataset
    order: SampleOrder
    objective: Objective
    batch_size: int
    accumulate: int
    eos_id: int | None = None
    """End of a text, if attention stays within documents."""
    variants: int | None = None
    """How many mask variants the passes over the data revisit in turn (None: masks are fresh in each pass)."""
    known: Objective | None = None
    """How the stacks above a new one have learned to read the same samples."""

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of a step (from 0)."""
        samples, epochs = self.order.at(step * self.batch_size, self.batch_size)
        variants = epochs if self.variants is None else epochs % self.variants
        parts = np.split(np.arange(self.batch_size), self.accumulate)
        return [self.batch(samples[part], variants[part]) for part in parts]

    def batch(self, samples: np.ndarray, variants: np.ndarray, activations: Tensor | None = None) -> Batch:
        """What a window sees of some samples under some mask variants.

        Args:
            samples, variants: `[n]`.
            activations: what stands for the masked tokens, where the window does not read them itself.
        """
        tokens = self.tokens.samples(samples)
        task = self.objective(tokens, samples, variants)
        return Batch(
            torch.from_numpy(task.inputs) if activations is None else activations,
            task.targets,
            torch.from_numpy(task.times.astype(np.float32)),
            segments_of(self.tokens, samples, tokens, self.eos_id),
            None if self.known is None else torch.from_numpy(self.known(tokens, samples, variants).inputs),
        )


def segments_of(dataset: TokenDataset, samples: np.ndarray, tokens: np.ndarray, eos_id: int | None) -> Tensor | None:
    """Who sees whom in some samples: packed rows never see each other, documents do unless `eos_id` tells them apart.

    Args:
        dataset: that holds them.
        samples: `[n]`.
        tokens: their ids without masks `[n, seq]`.
        eos_id: end of a text, if attention stays within documents.

    Returns:
        `[n, seq]` int64; None where all see all.
    """
    if dataset.packed:
        return torch.from_numpy(dataset.segments(samples))
    return None if eos_id is None else segments_of_documents(torch.from_numpy(tokens), eos_id)
