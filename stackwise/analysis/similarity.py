"""How alike representations are, and how many dimensions they use."""

import torch
from torch import Tensor

_BATCH = 256
"""Rows that are compared with each other at once."""


def unbiased_hsic(k: Tensor, m: Tensor) -> Tensor:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al. 2012, equation 5).

    Args:
        k, m: Gram matrices of the same n > 3 rows `[n, n]`.

    Returns:
        A scalar; its expectation is 0 for independent rows.
    """
    n = len(k)
    k, m = (gram - torch.diag(gram.diagonal()) for gram in (k, m))
    products = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return products / (n * (n - 3))


def cka(boundaries: list[Tensor], *, generator: torch.Generator) -> Tensor:
    """Linear centered kernel alignment of every two boundaries (Kornblith et al. 2019).

    It is 1 where two differ by a rotation and a scale, and 0 where they have nothing to do with each other. The
    criterion is estimated without bias on batches of rows and averaged over them (Nguyen et al. 2021, equations 2 and
    3), so neither memory nor the estimate grows with the width of the boundaries; estimates may be a little below 0.

    Args:
        boundaries: the same rows of each `[n, d_model]`, n > 3.
        generator: shuffles the rows, of which neighbours are alike.

    Returns:
        `[boundaries, boundaries]` fp64.
    """
    order = torch.randperm(len(boundaries[0]), generator=generator)
    found = torch.zeros(len(boundaries), len(boundaries), dtype=torch.float64)
    whole = [rows for rows in order.split(_BATCH) if len(rows) > 3]
    for rows in whole:
        # The criterion does not depend on the mean, which would cost its products their last digits.
        parts = [boundary[rows].double() for boundary in boundaries]
        grams = [x @ x.T for x in (part - part.mean(0) for part in parts)]
        for i, k in enumerate(grams):
            for j in range(i, len(grams)):
                found[i, j] += unbiased_hsic(k, grams[j])
    found = torch.triu(found) + torch.triu(found, 1).T
    own = found.diagonal().sqrt()
    return found / (own[:, None] * own)


def effective_rank(x: Tensor) -> float:
    """The exponential of the entropy of the singular values, each by their sum (Roy & Vetterli 2007, definition 1).

    It is n for n equal singular values, and 1 where all rows are multiples of one.

    Args:
        x: `[rows, columns]`.
    """
    values = torch.linalg.svdvals(x.double())
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))
