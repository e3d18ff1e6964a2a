"""The order in which samples are visited: a pure function of (seed, place)."""

from functools import lru_cache

import numpy as np


class SampleOrder:
    """Endless passes over `n` samples, each in an order of its own."""

    def __init__(self, n: int, *, seed: int, stream: str) -> None:
        """
        Args:
            n: number of samples.
            seed: of the pipeline.
            stream: who visits; each stream has other orders.
        """
        self.n = n
        self._key = [seed, *stream.encode()]
        self._permutation = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([epoch, *self._key]).permutation(self.n)

    def at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at places `start` ... `start + count - 1`, and the pass of each: two `[count]` int64."""
        epochs, places = np.divmod(np.arange(start, start + count), self.n)
        samples = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._permutation(int(epoch))[places[here]]
        return samples, epochs
