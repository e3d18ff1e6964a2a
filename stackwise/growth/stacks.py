"""Trained stacks on disk, and the new stack that grows on top of one."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

from stackwise.artifacts.manifest import Artifact
from stackwise.config.training import Init
from stackwise.errors import UserError
from stackwise.growth.init import initialize
from stackwise.growth.pretrained import find_matrices
from stackwise.growth.window import Window
from stackwise.model.embeddings import Embeddings
from stackwise.model.rack import Head, Rack, RackShape, empty_rack
from stackwise.model.stack import Stack

KIND = "stack"
M = TypeVar("M", bound=nn.Module)
_STACK, _HEAD, _EMBEDDINGS = "stack.safetensors", "head.safetensors", "embeddings.safetensors"


@dataclass(frozen=True)
class TrainedStack:
    """A stack's artifact, with what can be built from it."""

    artifact: Artifact

    @property
    def index(self) -> int:
        """Its place in the rack, from 0."""
        return int(self.artifact.facts["index"])

    @property
    def shape(self) -> RackShape:
        """The rack of this one stack."""
        return RackShape.from_json(self.artifact.facts["shape"])

    def load_stack(self) -> Stack:
        """The stack in fp32."""
        return _loaded(self.shape.build_stack(0), self.artifact.path / _STACK)

    def load_head(self, embeddings: Embeddings | None) -> Head:
        """The final norm and head as they were after this stack; tied to `embeddings` if the model ties them."""
        return _loaded(self.shape.build_head(embeddings), self.artifact.path / _HEAD)

    def load_embeddings(self) -> Embeddings:
        """The embeddings (only stack 0 has them)."""
        return _loaded(self.shape.build_embeddings(), self.artifact.path / _EMBEDDINGS)


def save_stack(directory: Path, window: Window, *, index: int, shape: RackShape) -> dict[str, Any]:
    """Write a window of one stack; returns the facts that `TrainedStack` reads."""
    (stack,) = window.stacks
    save_file(stack.state_dict(), directory / _STACK)
    save_file(window.head.state_dict(), directory / _HEAD)
    if index == 0:
        assert window.embeddings is not None
        save_file(window.embeddings.state_dict(), directory / _EMBEDDINGS)
    return {"index": index, "shape": shape.to_json()}


def new_window(
    index: int,
    *,
    shape: RackShape,
    init: Init,
    seed: int,
    below: TrainedStack | None,
    first: TrainedStack | None,
    with_embeddings: bool = False,
) -> Window:
    """The window in which stack `index` trains when a rack grows by appending.

    Head and final norm are carried over from the stack below and keep training. Embeddings train with the first stack
    and are frozen after it, and with them a head that is tied to them. Matrices that come from another model are read
    for the first stack; of a frozen one the adapter trains in its place.

    Args:
        index: place of the new stack, from 0.
        shape: of the rack of this one stack.
        init: how its weights start.
        seed: of the pipeline.
        below: stack `index - 1` (None for the first).
        first: stack 0, for its embeddings (may be None where none are needed).
        with_embeddings: whether the window needs embeddings even if its head is not tied to them.

    Raises:
        UserError: the stack below does not fit, or a pretrained matrix cannot be used.
    """
    stack = shape.build_stack(0)
    initialize(stack, name=f"stacks.{index}", seed=seed)
    embeddings: Embeddings | None
    if below is None:
        embeddings = shape.build_embeddings()
        initialize(embeddings, name="embeddings", seed=seed)
        head = shape.build_head(embeddings)
        initialize(head, name="head", seed=seed)
        for matrix in find_matrices(shape.model):
            part = embeddings if matrix.key == "model.embeddings" else head
            part.take(matrix.read(shape.vocab_size))
    else:
        _check_continues(below, index, shape)
        embeddings = None
        if shape.model.tie_embeddings or with_embeddings:
            assert first is not None
            embeddings = first.load_embeddings().requires_grad_(False)
        head = below.load_head(embeddings)
        if init == "copy":
            _copy_blocks(below.load_stack(), stack)
    if init == "zero":
        _zero_outputs(stack)
    return Window([stack], head, embeddings)


def fuse(stacks: list[TrainedStack]) -> Rack:
    """The rack of all `stacks`, bottom to top, with the head of the last.

    Raises:
        UserError: the stacks do not belong together.
    """
    first, last = stacks[0], stacks[-1]
    for index, (below, above) in enumerate(pairwise(stacks), 1):
        _check_continues(below, index, above.shape)
        if above.artifact.inputs.get("below") != below.artifact.digest:
            raise UserError(
                f"{above.artifact.path}: was trained on another stack {below.index} than the one in "
                f"{below.artifact.path}; run `dvc repro` or `snakemake`, which train it again"
            )
    rack = empty_rack(replace(first.shape, stacks=tuple(s.shape.stacks[0] for s in stacks)))
    embeddings = first.load_embeddings()
    rack.embeddings = embeddings
    rack.stacks = nn.ModuleList(s.load_stack() for s in stacks)
    rack.head = last.load_head(embeddings)
    return rack


def _check_continues(below: TrainedStack, index: int, shape: RackShape) -> None:
    if below.index != index - 1 or replace(below.shape, stacks=()) != replace(shape, stacks=()):
        raise UserError(
            f"{below.artifact.path}: cannot stand below stack {index}: it is stack {below.index} of another "
            "architecture or vocabulary; run `dvc repro` or `snakemake`, which train what does not fit again"
        )


def _copy_blocks(source: Stack, target: Stack) -> None:
    """Copy weights block by block, beginning again from the lowest where the target has more blocks."""
    for i, block in enumerate(target.blocks):
        block.load_state_dict(source.blocks[i % len(source.blocks)].state_dict())


def _zero_outputs(stack: Stack) -> None:
    """Zero what each block adds to the residual stream: the stack starts as the identity."""
    for name, parameter in stack.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)


def _loaded(module: M, file: Path) -> M:
    module.load_state_dict(load_file(file))
    return module
