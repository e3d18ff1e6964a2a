"""Input embeddings: a row for each id of a text, and one for the mask token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """An MLP between two widths: `output(silu(hidden(x)))`."""

    def __init__(self, d_in: int, hidden: int, d_out: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_in, hidden, bias=False)
        self.output = nn.Linear(hidden, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_in]` -> `[..., d_out]`."""
        return self.output(F.silu(self.hidden(x)))


class Embeddings(nn.Module):
    """Token ids -> the residual stream. Id V, the mask token, has a row of its own."""

    def __init__(self, vocab_size: int, d_model: int, *, width: int | None = None, adapter_hidden: int | None = None):
        """
        Args:
            vocab_size: V.
            d_model: width of the residual stream.
            width: of the table, if another (a pretrained one).
            adapter_hidden: hidden width of the MLP from `width` to `d_model`.
        """
        super().__init__()
        self.vocab_size = vocab_size
        width = width or d_model
        self.table = nn.Parameter(torch.empty(vocab_size, width))
        self.mask = nn.Parameter(torch.empty(1, width))
        self.adapter = Adapter(width, adapter_hidden, d_model) if adapter_hidden else None

    @torch.no_grad()
    def take(self, rows: Tensor) -> None:
        """Begin with the rows `[vocab_size, width]` of another model; the mask, which it lacks, with their mean."""
        self.table.copy_(rows)
        self.mask.copy_(rows.mean(dim=0, keepdim=True))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, seq]` int64 -> `[batch, seq, d_model]`."""
        x = F.embedding(tokens.clamp(max=self.vocab_size - 1), self.table)
        x = torch.where((tokens == self.vocab_size)[..., None], self.mask[0], x)
        return x if self.adapter is None else self.adapter(x)
