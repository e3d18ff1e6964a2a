"""Rack: embeddings, stacks, head. The whole model, and the head that every stack trains with."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import ModelParams
from stackwise.model.stack import Stack


@dataclass(frozen=True)
class RackShape:
    """What must be known to build a rack."""

    model: ModelParams
    blocks: tuple[int, ...]
    """Blocks of each stack, bottom to top."""
    vocab_size: int
    """V: the ids that the head predicts; id V is the mask token, which only the embedding knows."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for manifests."""
        return {"model": self.model.model_dump(), "blocks": list(self.blocks), "vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, shape: dict[str, Any]) -> "RackShape":
        """The inverse of `to_json`."""
        return cls(ModelParams.model_validate(shape["model"]), tuple(shape["blocks"]), shape["vocab_size"])


class Head(nn.Module):
    """The final RMSNorm and the projection to the vocabulary."""

    def __init__(self, params: ModelParams, vocab_size: int, tied_to: nn.Embedding | None = None) -> None:
        """With `tied_to` the projection is the first `vocab_size` rows of that embedding, not a weight of its own."""
        super().__init__()
        self.norm = nn.RMSNorm(params.d_model, eps=params.norm_eps)
        self.vocab_size = vocab_size
        self._tied_to = (tied_to,)  # in a tuple, so that the embedding is not registered as a part of the head
        if tied_to is None:
            self.projection = nn.Linear(params.d_model, vocab_size, bias=False)

    @property
    def weight(self) -> Tensor:
        """The projection `[vocab_size, d_model]`."""
        (embedding,) = self._tied_to
        return self.projection.weight if embedding is None else embedding.weight[: self.vocab_size]

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` of a residual stream `[..., d_model]`. Training never makes them all: see
        `stackwise.objectives.loss`."""
        return F.linear(self.norm(x), self.weight)


class Rack(nn.Module):
    """The whole model."""

    def __init__(self, shape: RackShape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = nn.Embedding(shape.vocab_size + 1, shape.model.d_model)
        self.stacks = nn.ModuleList(Stack(shape.model, n) for n in shape.blocks)
        tied_to = self.embeddings if shape.model.tie_embeddings else None
        self.head = Head(shape.model, shape.vocab_size, tied_to)

    def forward(self, tokens: Tensor, *, causal: bool = False) -> Tensor:
        """Token ids `[batch, seq]` -> the residual stream below the head `[batch, seq, d_model]`."""
        x = self.embeddings(tokens)
        for stack in self.stacks:
            x = stack(x, causal=causal)
        return x

    def logits(self, tokens: Tensor, *, causal: bool = False) -> Tensor:
        """Token ids `[batch, seq]` -> logits `[batch, seq, vocab_size]`."""
        return self.head(self(tokens, causal=causal))
