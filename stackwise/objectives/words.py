"""Whole words: which tokens are hidden or shown together (Devlin et al. 2019, whole-word masking)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Words:
    """Cuts samples into words."""

    starts: NDArray[np.bool_]
    """Which ids begin a word `[V]`, from the tokens artifact."""
    eos_id: int
    """End of a text, which is a word of its own."""

    def of(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """The number of each token's word.

        The first token of a sample begins one, also where the sample begins within a word.

        Args:
            tokens: ids without masks `[batch, seq]`.

        Returns:
            `[batch, seq]`, from 0 in each sample, rising by at most 1 from token to token.
        """
        begins = self.starts[tokens]
        begins[:, 1:] |= tokens[:, :-1] == self.eos_id
        begins[:, 0] = False  # the first word has the number 0
        return np.cumsum(begins, axis=1)
