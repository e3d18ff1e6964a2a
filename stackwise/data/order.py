"""The order in which samples are visited: a pure function of (seed, place)."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stackwise.errors import UserError


def groups_of(n: int, size: int, *, seed: int) -> NDArray[np.int64]:
    """Groups of samples that are always visited together, `[n // size, size]`; what is left over is in none.

    Args:
        n: number of samples.
        size: samples of a group.
        seed: of the pipeline; whoever visits `n` samples in groups of this size finds the same ones.

    Raises:
        UserError: there are not enough samples for one group.
    """
    if n < size:
        raise UserError(
            f"model.time.sampling = batch: a batch has {size} samples, but the training split only {n}; "
            "lower the batch_size, give more text or set model.time.sampling to sample"
        )
    order = np.random.default_rng([seed, *b"groups"]).permutation(n)
    return order[: n // size * size].reshape(-1, size)


class SampleOrder:
    """Endless passes over `n` samples, each in an order of its own."""

    def __init__(self, n: int, *, seed: int, stream: str, group: int = 1) -> None:
        """
        Args:
            n: number of samples.
            seed: of the pipeline.
            stream: who visits; each stream has other orders.
            group: visit the samples of each of the groups that `groups_of` makes of this size together; 1: no groups.

        Raises:
            UserError: there are fewer samples than a group has.
        """
        self.stream = stream
        self._groups = groups_of(n, group, seed=seed) if group > 1 else np.arange(n)[:, None]
        self._all = n
        self.n = self._groups.size
        """Samples that a pass visits: all but those that fill no group."""
        self._key = [seed, *stream.encode()]
        self._permutation = lru_cache(maxsize=2)(self._draw)
        self._inverse = lru_cache(maxsize=2)(self._invert)

    def _draw(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng([epoch, *self._key]).permutation(len(self._groups))
        return self._groups[order].reshape(-1)

    def _invert(self, epoch: int) -> np.ndarray:
        places = np.zeros(self._all, dtype=np.int64)
        places[self._permutation(epoch)] = np.arange(self.n)
        return places

    def at(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at places `start` ... `start + count - 1`, and the pass of each: two `[count]` int64."""
        epochs, places = np.divmod(np.arange(start, start + count), self.n)
        samples = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._permutation(int(epoch))[places[here]]
        return samples, epochs

    def place_of(self, samples: np.ndarray, epochs: np.ndarray) -> NDArray[np.int64]:
        """The inverse of `at`: the place at which each sample is visited in a pass.

        Args:
            samples: `[n]`.
            epochs: the pass of each, `[n]`.

        Returns:
            `[n]`; the first place of the pass for a sample that is in no group.
        """
        places = np.empty(len(samples), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = epoch * self.n + self._inverse(int(epoch))[samples[here]]
        return places
