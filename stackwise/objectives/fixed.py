"""Masks that a sample keeps: a few of its own, or from a pool that all samples share."""

import numpy as np
from numpy.typing import NDArray

from stackwise.config.objective import ObjectiveParams
from stackwise.objectives.draws import generator
from stackwise.objectives.masks import MaskRates, draw_mask, draw_masks

_POOL = 0x706F6F6C


class FixedMaskAssigner:
    """M mask variants for each sample, revisited in turn; identical patterns are stored once.

    A sample's masks are its own (`objective.masks: fixed`) or come from a pool (`pool`). The pool's patterns are
    spread evenly over the distribution of mask rates, and a variant takes one of the rate that it would have drawn.
    """

    def __init__(self, params: ObjectiveParams, *, seed: int, seq: int, rates: MaskRates | None = None) -> None:
        """
        Args:
            params: the section `objective`; `variants` is M, with a `pool_size` the masks come from a pool.
            seed: of the pipeline.
            seq: tokens of a sample.
            rates: of the variants (None: drawn as the parameters say).
        """
        self.variants = params.variants
        self._params, self._seed, self._seq = params, seed, seq
        self._rates_of = rates or MaskRates(params, seed)
        self._numbers: dict[bytes, int] = {}
        self._rates = np.empty((0, self.variants))
        self.index: NDArray[np.int64] = np.empty((0, self.variants), dtype=np.int64)
        """Number of the pattern of each sample under each variant `[samples, M]`; -1 before its first use."""
        self._packed: list[bytes] = []
        self._pool = [self._store(mask) for mask in self._draw_pool()] if params.pool_size else []

    @property
    def patterns(self) -> NDArray[np.bool_]:
        """The patterns that are stored, `[patterns, seq]`; no two are equal."""
        return self._unpack(self._packed)

    def __call__(
        self, samples: np.ndarray, passes: np.ndarray, words: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The rates t `[n]` and masks `[n, seq]` of some samples `[n]`, each in a pass over the data `[n]`.

        Args:
            samples: their numbers.
            passes: pass p takes the variant p modulo M.
            words: numbers of the words `[n, seq]`, if whole words are masked.
        """
        variants = passes % self.variants
        self._reach(int(samples.max(initial=-1)) + 1)
        new = self.index[samples, variants] < 0
        if new.any():
            rates, numbers = self._assign(samples[new], variants[new], None if words is None else words[new])
            self._rates[samples[new], variants[new]] = rates
            self.index[samples[new], variants[new]] = numbers
        masks = self._unpack([self._packed[number] for number in self.index[samples, variants].tolist()])
        return self._rates[samples, variants], masks

    def _assign(
        self, samples: np.ndarray, variants: np.ndarray, words: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float64], list[int]]:
        if not self._pool:
            rates, masks = draw_masks(
                self._params,
                seed=self._seed,
                samples=samples,
                variants=variants,
                seq=self._seq,
                rates=self._rates_of,
                words=words,
            )
            return rates, [self._store(mask) for mask in masks]
        chosen = (self._rates_of.quantiles(samples, variants) * len(self._pool)).astype(int)
        return self._pool_rates[chosen], [self._pool[i] for i in chosen.tolist()]

    def _draw_pool(self) -> list[NDArray[np.bool_]]:
        size = self._params.pool_size or 0
        self._pool_rates, masks = np.empty(size), []
        for i in range(size):
            draws = generator(self._seed, _POOL, i, 0)
            self._pool_rates[i] = self._rates_of.at((i + draws.random()) / size)
            masks.append(draw_mask(draws, self._pool_rates[i], self._seq, exact=self._params.count == "exact"))
        return masks

    def _store(self, mask: NDArray[np.bool_]) -> int:
        packed = np.packbits(mask).tobytes()
        number = self._numbers.setdefault(packed, len(self._packed))
        if number == len(self._packed):
            self._packed.append(packed)
        return number

    def _unpack(self, packed: list[bytes]) -> NDArray[np.bool_]:
        rows = np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(packed), -1 if packed else 1)
        return np.unpackbits(rows, axis=1, count=self._seq).astype(bool) if packed else np.empty((0, self._seq), bool)

    def _reach(self, samples: int) -> None:
        """Make room for so many samples; what is there doubles, so that this is rare."""
        more = samples - len(self.index)
        if more > 0:
            shape = (max(more, len(self.index)), self.variants)
            self.index = np.concatenate((self.index, np.full(shape, -1)))
            self._rates = np.concatenate((self._rates, np.zeros(shape)))
