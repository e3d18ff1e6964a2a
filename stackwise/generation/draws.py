"""The chance in a text: a function of the seed and of the text's number, not of what else is made with it."""

import numpy as np

from stackwise.objectives.draws import generator

_STREAM = 0x74657874  # keeps these draws apart from others that use the same seed


def draws_of_text(seed: int, index: int) -> np.random.Generator:
    """The generator of text `index`."""
    return generator(seed, _STREAM, index, 0)
