"""Random numbers as a pure function of (seed, stream, sample, variant)."""

from collections.abc import Sequence

import numpy as np


def generator(seed: int, stream: int, sample: int, variant: int) -> np.random.Generator:
    """A counter-based generator: any pair's draws without drawing those before it.

    Args:
        seed: of the pipeline.
        stream: keeps the draws of one use apart from those of another.
        sample: number of the sample.
        variant: its mask variant; may be negative.
    """
    counter: Sequence[int] = (0, 0, sample, variant % 2**64)
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)))
