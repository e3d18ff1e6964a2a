"""What stands in place of the tokens that are to be predicted."""

import numpy as np
from numpy.typing import NDArray

from stackwise.objectives.draws import generator

_STREAM = 0x636F7272


def corrupt(
    tokens: NDArray[np.int64],
    mask: NDArray[np.bool_],
    *,
    mask_id: int,
    random_share: float,
    keep_share: float,
    seed: int,
    samples: np.ndarray,
    variants: np.ndarray,
) -> NDArray[np.int64]:
    """Hide tokens behind the mask token; some show a random token or themselves instead (Devlin et al. 2019, BERT).

    Args:
        tokens: `[batch, seq]`.
        mask: which of them are to be predicted `[batch, seq]`.
        mask_id: V, id of the mask token.
        random_share: of the masked tokens, those that show one drawn from all V ids.
        keep_share: those that show themselves.
        seed, samples, variants: the draws are a function of (seed, sample, variant); two `[batch]`.

    Returns:
        What the model sees `[batch, seq]`.
    """
    inputs = np.where(mask, mask_id, tokens)
    if not random_share and not keep_share:
        return inputs
    seq = tokens.shape[1]
    for i, (sample, variant) in enumerate(zip(samples.tolist(), variants.tolist(), strict=True)):
        draws = generator(seed, _STREAM, sample, variant)
        u, others = draws.random(seq), draws.integers(mask_id, size=seq)
        random, keep = u < random_share, (u >= random_share) & (u < random_share + keep_share)
        inputs[i] = np.select([mask[i] & random, mask[i] & keep], [others, tokens[i]], inputs[i])
    return inputs
