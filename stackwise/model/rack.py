"""Rack: embeddings, stacks, head. The whole model, and the head that every stack trains with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.model.context import Context
from stackwise.model.embeddings import Adapter, Embeddings
from stackwise.model.norm import RMSNorm
from stackwise.model.parts import DecodingCache
from stackwise.model.stack import Stack


@dataclass(frozen=True)
class StackShape:
    """What must be known to build a stack, besides what the rack's stacks share."""

    blocks: int
    attention: AttentionParams
    mlp: MLPParams


@dataclass(frozen=True)
class RackShape:
    """What must be known to build a rack."""

    model: ModelParams
    """What the stacks share. Its attention and mlp are left at their defaults: each stack has its own."""
    stacks: tuple[StackShape, ...]
    """Bottom to top."""
    vocab_size: int
    """V: the ids that the head predicts; id V is the mask token, which only the embedding knows."""
    embedding_width: int
    """Width of the input embeddings: `d_model`, or that of the model they come from."""
    head_width: int
    """Width of the output head: likewise."""
    entries: tuple[float, ...] = ()
    """Depth as time: for each stack the share of masked tokens that it and those above it have learned to read straight
    from the embeddings. Empty: only the lowest has."""

    def __post_init__(self) -> None:
        shared = self.model.model_copy(update={"attention": AttentionParams(), "mlp": MLPParams()})
        object.__setattr__(self, "model", shared)

    @classmethod
    def of(
        cls,
        model: ModelParams,
        blocks: Sequence[int],
        vocab_size: int,
        *,
        embedding_width: int | None = None,
        head_width: int | None = None,
    ) -> "RackShape":
        """A rack whose stacks differ in nothing but their number of `blocks`; widths that are None are `d_model`."""
        stacks = tuple(StackShape(n, model.attention, model.mlp) for n in blocks)
        return cls(model, stacks, vocab_size, embedding_width or model.d_model, head_width or model.d_model)

    @property
    def widths(self) -> dict[str, int]:
        """Those of the embeddings and the head, as `of` takes them."""
        return {"embedding_width": self.embedding_width, "head_width": self.head_width}

    def entry(self, t: float) -> int:
        """The highest stack at which text may enter of which the share `t` is masked."""
        return max((k for k, own in enumerate(self.entries) if own >= t), default=0)

    def stack_model(self, k: int) -> ModelParams:
        """The architecture of stack `k`."""
        return self.model.model_copy(update={"attention": self.stacks[k].attention, "mlp": self.stacks[k].mlp})

    def build_stack(self, k: int) -> Stack:
        """Stack `k`, its weights not yet drawn."""
        return Stack(self.stack_model(k), self.stacks[k].blocks)

    def build_embeddings(self) -> Embeddings:
        """The embeddings, not yet drawn."""
        params = self.model.embeddings
        built = Embeddings(
            self.vocab_size, self.model.d_model, width=self.embedding_width, adapter_hidden=params.adapter_hidden
        )
        built.table.requires_grad_(params.train)
        return built

    def build_head(self, embeddings: Embeddings | None) -> "Head":
        """The head, not yet drawn; tied to `embeddings` if the model ties them."""
        tied_to = embeddings if self.model.tie_embeddings else None
        built = Head(self.model, self.vocab_size, width=self.head_width, tied_to=tied_to)
        if tied_to is None:
            built.projection.requires_grad_(self.model.head.train)
        return built

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for manifests."""
        stacks = [
            {"blocks": s.blocks, "attention": s.attention.model_dump(), "mlp": s.mlp.model_dump()} for s in self.stacks
        ]
        model = self.model.model_dump(exclude={"attention", "mlp"})
        entries = list(self.entries)
        return {"model": model, "stacks": stacks, "vocab_size": self.vocab_size, **self.widths, "entries": entries}

    @classmethod
    def from_json(cls, shape: dict[str, Any]) -> "RackShape":
        """The inverse of `to_json`."""
        stacks = tuple(
            StackShape(s["blocks"], AttentionParams.model_validate(s["attention"]), MLPParams.model_validate(s["mlp"]))
            for s in shape["stacks"]
        )
        model = ModelParams.model_validate(shape["model"])
        widths, entries = (shape["embedding_width"], shape["head_width"]), tuple(shape["entries"])
        return cls(model, stacks, shape["vocab_size"], *widths, entries)


class Head(nn.Module):
    """The final RMSNorm and the projection to the vocabulary."""

    def __init__(
        self, params: ModelParams, vocab_size: int, *, width: int | None = None, tied_to: Embeddings | None = None
    ) -> None:
        """
        Args:
            params: the architecture.
            vocab_size: V.
            width: of the projection, if another than `d_model` (a pretrained one).
            tied_to: embeddings whose table is the projection.
        """
        super().__init__()
        self.norm = RMSNorm(params.d_model, params.norm_eps)
        self.vocab_size = vocab_size
        self._tied_to = (tied_to,)  # in a tuple, so that the embeddings are not registered as a part of the head
        hidden = params.head.adapter_hidden
        self.adapter = Adapter(params.d_model, hidden, width or params.d_model) if hidden else None
        self.packed: nn.Module | None = None
        """The projection in another layout (`stackwise.generation.packing`)."""
        if tied_to is None:
            self.projection = nn.Linear(width or params.d_model, vocab_size, bias=False)

    @property
    def weight(self) -> Tensor:
        """The projection `[vocab_size, width]`."""
        (embeddings,) = self._tied_to
        return self.projection.weight if embeddings is None else embeddings.table

    @torch.no_grad()
    def take(self, rows: Tensor) -> None:
        """Begin with the projection `[vocab_size, width]` of another model."""
        self.projection.weight.copy_(rows)

    def features(self, x: Tensor) -> Tensor:
        """A residual stream `[..., d_model]` -> what the projection is applied to `[..., width]`."""
        x = self.norm(x)
        return x if self.adapter is None else self.adapter(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` of a residual stream `[..., d_model]`. Training never makes them all: see
        `stackwise.objectives.loss`."""
        rows = self.features(x)
        return F.linear(rows, self.weight) if self.packed is None else self.packed(rows)


class Rack(nn.Module):
    """The whole model."""

    def __init__(self, shape: RackShape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = shape.build_embeddings()
        self.stacks = nn.ModuleList(shape.build_stack(k) for k in range(len(shape.stacks)))
        self.head = shape.build_head(self.embeddings)

    def forward(
        self,
        tokens: Tensor,
        *,
        causal: bool = False,
        times: Tensor | None = None,
        segments: Tensor | None = None,
        padding: Tensor | None = None,
        cache: list[list[DecodingCache]] | None = None,
        entry: int = 0,
    ) -> Tensor:
        """Token ids `[batch, seq]` -> the residual stream below the head `[batch, seq, d_model]`.

        Args:
            tokens: ids; the mask token is id V.
            causal: whether a position may only look back.
            times: the mask rate t of each sample `[batch]`, for models that are conditioned on it.
            segments: see `Context.segments`.
            padding: see `Context.padding`; wants `segments` that set it apart.
            cache: from `new_cache`: `tokens` continue what it has seen; wants `causal`.
            entry: the stack at which they enter; those below it are passed by.
        """
        context = Context(causal=causal, segments=segments, times=times, padding=padding)
        x = self.embeddings(tokens)
        for k, stack in enumerate(self.stacks[entry:], entry):
            x = stack(x, context, cache=cache[k] if cache else None)
        return x

    def logits(
        self, tokens: Tensor, *, causal: bool = False, times: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Token ids `[batch, seq]` -> logits `[batch, seq, vocab_size]`."""
        return self.head(self(tokens, causal=causal, times=times, segments=segments))

    def new_cache(self, batch: int, capacity: int) -> list[list[DecodingCache]]:
        """Empty decoding caches of all stacks for up to `capacity` positions, where and as the weights are."""
        weight = self.head.norm.weight
        return [stack.new_cache(batch, capacity, weight.device, weight.dtype) for stack in self.stacks]  # type: ignore[operator]


def empty_rack(shape: RackShape) -> Rack:
    """A rack without memory for its weights, to be loaded with `assign=True`."""
    with torch.device("meta"):
        return Rack(shape)
