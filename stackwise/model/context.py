"""What the blocks of a rack must know besides the residual stream."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Context:
    """The same for all blocks in one pass."""

    causal: bool = False
    """Whether a position may only look at itself and back."""
    segments: Tensor | None = None
    """`[batch, seq]` int64: positions of different numbers do not see each other. Documents of a packed sample and
    padding are segments. With a decoding cache it begins where the cache began, `[batch, cached + seq]`."""
    times: Tensor | None = None
    """The mask rate t of each sample `[batch]` fp32, for stacks that are conditioned on it."""

    _allowed: Tensor | None = field(default=None, init=False)

    @property
    def allowed(self) -> Tensor | None:
        """Which query sees which key, `[batch, 1, seq, seq]` bool; None without segments. Made when a block first asks
        for it: attention by kernels never does."""
        if self.segments is not None and self._allowed is None:
            same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
            self._allowed = same.tril() if self.causal else same
        return self._allowed


def segments_of_documents(tokens: Tensor, eos_id: int) -> Tensor:
    """Number the documents of packed samples: a document ends with `eos_id`, which belongs to it.

    Args:
        tokens: ids without masks `[batch, seq]`.
        eos_id: id of the end of a text.

    Returns:
        `[batch, seq]` int64, from 0 in each sample.
    """
    ends = (tokens == eos_id).long()
    return torch.cumsum(ends, dim=1) - ends
