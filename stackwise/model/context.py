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
    padding: Tensor | None = None
    """Positions in front of each sample's first `[batch]` int64, which is then position 0 of its text. They are a
    segment of their own."""

    _allowed: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    def start(self, seen: int) -> int | Tensor:
        """The place in its text of what comes behind `seen` positions; of each sample `[batch]` if there is padding."""
        return seen if self.padding is None else seen - self.padding

    def allowed(self, n: int, m: int) -> Tensor | None:
        """Which of the last `n` of `m` positions sees which of these, `[batch, 1, n, m]` bool; None without segments.
        Made when a block first asks for it: attention by kernels never does."""
        if self.segments is None:
            return None
        if (n, m) not in self._allowed:
            segments = self.segments[:, :m]
            same = segments[:, None, m - n :, None] == segments[:, None, None, :]
            self._allowed[n, m] = same.tril(m - n) if self.causal and n > 1 else same
        return self._allowed[n, m]


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
