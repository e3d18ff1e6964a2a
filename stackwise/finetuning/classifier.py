"""A rack with a head for labels: of whole texts, or of each word. It reads in both directions."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.growth.racks import SHAPE, TOKENIZER, load_weights, save_weights, shape_of
from stackwise.growth.window import Window
from stackwise.model.context import Context
from stackwise.model.norm import RMSNorm
from stackwise.model.rack import Rack, RackShape
from stackwise.model.stack import Stack

KIND = "classifier"
CLASSES = "classifier.json"


@dataclass(frozen=True)
class Classes:
    """What a classifier tells apart."""

    labels: tuple[str, ...]
    """Names, by number."""
    pooled: bool
    """Whether a whole text has one label; if not, each token may have one."""


class ClassificationHead(nn.Module):
    """The rack's final norm, the mean over the positions of a text if that has one label, and a projection.

    `logits = W mean_i RMSNorm(x_i)`, or `W RMSNorm(x_i)` for each token. `W` begins as zero: all classes are equally
    likely.
    """

    def __init__(self, d_model: int, norm_eps: float, classes: Classes) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.projection = nn.Linear(d_model, len(classes.labels), bias=False)
        self.pooled = classes.pooled

    @property
    def weight(self) -> Tensor:
        """`[labels, d_model]`."""
        return self.projection.weight

    def read(self, x: Tensor, segments: Tensor | None) -> Tensor:
        """The residual stream -> what the projection is applied to, both `[batch, seq, d_model]`.

        Args:
            x: below the head.
            segments: numbers of the texts `[batch, seq]`, where a sample holds several (None: one).
        """
        x = self.norm(x)
        return mean_of_segments(x, segments) if self.pooled else x

    def features(self, x: Tensor) -> Tensor:
        """As of the head of a rack: nothing more is to be done."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """What `read` makes -> logits `[..., labels]`."""
        return F.linear(x, self.weight)


def mean_of_segments(x: Tensor, segments: Tensor | None) -> Tensor:
    """The mean over each position's segment, at each position: `[batch, seq, d]` -> `[batch, seq, d]`.

    Args:
        x: anything.
        segments: numbers from 0 `[batch, seq]` (None: all of a sample are one).
    """
    if segments is None:
        return x.mean(dim=1, keepdim=True).expand_as(x)
    batch, _, width = x.shape
    most = int(segments.max()) + 1
    places = (segments + most * torch.arange(batch, device=x.device)[:, None]).reshape(-1)
    sums = x.new_zeros(batch * most, width).index_add_(0, places, x.reshape(-1, width))
    counts = torch.bincount(places, minlength=batch * most).clamp(min=1)
    return (sums / counts[:, None].to(x.dtype))[places].view_as(x)


class Classifier(nn.Module):
    """Embeddings and stacks of a rack with a `ClassificationHead`."""

    def __init__(self, shape: RackShape, classes: Classes) -> None:
        super().__init__()
        self.shape, self.classes = shape, classes
        self.embeddings = shape.build_embeddings()
        self.stacks = nn.ModuleList(shape.build_stack(k) for k in range(len(shape.stacks)))
        self.head = ClassificationHead(shape.model.d_model, shape.model.norm_eps, classes)

    @classmethod
    def of(cls, rack: Rack, classes: Classes) -> "Classifier":
        """A rack with another head, whose norm is the rack's and learns. It shares the rack's weights."""
        with torch.device("meta"):
            built = cls(rack.shape, classes)
        built.embeddings, built.stacks = rack.embeddings, rack.stacks
        built.head.norm = rack.head.norm.requires_grad_(True)
        built.head.projection.weight = nn.Parameter(torch.zeros(len(classes.labels), rack.shape.model.d_model))
        return built

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Token ids `[batch, seq]` -> logits `[batch, seq, labels]`; of whole texts the same at all their positions.

        Args:
            tokens: ids.
            segments: numbers of the texts `[batch, seq]`, where a sample holds several or is filled up (None: one).
        """
        context = Context(segments=segments)
        x = self.embeddings(tokens)
        for stack in self.stacks:
            x = stack(x, context)
        return self.head(self.head.read(x, segments))

    def window(self, *, checkpointing: bool = False) -> Window:
        """What trains of it; it shares the weights."""
        return _ClassifyingWindow(self._stacks(), self.head, self.embeddings, checkpointing=checkpointing)  # type: ignore[arg-type]

    def _stacks(self) -> Iterator[Stack]:
        yield from (stack for stack in self.stacks if isinstance(stack, Stack))


class _ClassifyingWindow(Window):
    """A window whose head reads whole texts."""

    def _streams(self, inputs: Tensor, context: Context) -> list[Tensor]:
        streams = super()._streams(inputs, context)
        head = self.head
        assert isinstance(head, ClassificationHead)
        return [*streams[:-1], head.read(streams[-1], context.segments)]


def save_classifier(directory: Path, model: Classifier, tokenizer: Path) -> None:
    """Write `model.safetensors`, `rack.json`, `classifier.json` (the labels' names by number, and whether a whole text
    has one) and a copy of the tokenizer; adapters that are not merged beside them, as `save_rack` does."""
    save_weights(directory, model)
    shutil.copytree(tokenizer, directory / TOKENIZER)
    (directory / SHAPE).write_text(json.dumps(model.shape.to_json(), indent=1, sort_keys=True) + "\n")
    own = {"labels": list(model.classes.labels), "pooled": model.classes.pooled}
    (directory / CLASSES).write_text(json.dumps(own, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_classifier(directory: Path) -> Classifier:
    """What `save_classifier` wrote, in fp32, its adapters merged."""
    own = json.loads((directory / CLASSES).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = Classifier(shape_of(directory), Classes(tuple(own["labels"]), own["pooled"]))
    load_weights(model, directory)
    return model
