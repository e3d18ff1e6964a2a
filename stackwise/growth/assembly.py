"""The window of one training, put together from what earlier trainings have left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from stackwise.config.growth import AdaptersParams, Kind
from stackwise.config.params import Params
from stackwise.growth.init import initialize
from stackwise.growth.phases import KEPT, Member
from stackwise.growth.pretrained import find_matrices, vocabulary_widths
from stackwise.growth.stacks import (
    EMBEDDINGS,
    HEAD,
    Training,
    adapters_directory,
    check_continues,
    latest,
    latest_adapters,
    latest_embeddings,
    stack_file,
)
from stackwise.growth.window import Trunk, Unfreezing, Window
from stackwise.model.embeddings import Embeddings
from stackwise.model.rack import Head, RackShape
from stackwise.model.stack import Stack
from stackwise.precision.trunk import TrunkStack
from stackwise.variants import lora


@dataclass
class Assembly:
    """A window, and what of it is kept after it has been trained."""

    window: Window
    members: Sequence[Member]
    shape: RackShape
    """Of the rack of the stacks whose weights are kept."""
    adapters: Mapping[int, Kind]
    """Which adapters of a stack learn, where some do."""
    embeddings_learn: bool

    def save(self, directory: Path) -> dict[str, Any]:
        """Write what has learned, from a window on the CPU; returns the facts that `Training` reads."""
        modules = {m.stack: s for m, s in zip(self.members, self.window.stacks, strict=True)}
        kept = [m.stack for m in self.members if m.role in KEPT]
        for k in kept:
            weights = lora().base_weights(modules[k]) if k in self.adapters else modules[k].state_dict()
            save_file(weights, directory / stack_file(k))
        for k, kind in self.adapters.items():
            lora().save_adapter(modules[k], kind, directory / adapters_directory(k))
        save_file(self.window.head.state_dict(), directory / HEAD)
        if self.embeddings_learn:
            assert self.window.embeddings is not None
            save_file(self.window.embeddings.state_dict(), directory / EMBEDDINGS)
        return {
            "stacks": kept,
            "adapters": {str(k): kind for k, kind in self.adapters.items()},
            "embeddings": self.embeddings_learn,
            "shape": self.shape.to_json(),
        }

    def rates(self, params: AdaptersParams) -> dict[str, float]:
        """The peak learning rate of each parameter of the window that has one of its own."""
        rates: dict[str, float] = {}
        for place, member in enumerate(self.members):
            if (kind := self.adapters.get(member.stack)) and (lr := getattr(params, kind).lr) is not None:
                own = self.window.stacks[place].named_parameters()
                rates |= {f"stacks.{place}.{name}": lr for name, p in own if p.requires_grad}
        return rates


@dataclass
class Ground:
    """What a window is built on: what earlier trainings have left."""

    trainings: Sequence[Training] = ()
    """Those that hold what is needed, in the order in which they took place; the last is the one before."""
    quantized: Mapping[int, TrunkStack] = field(default_factory=dict)
    """The stacks of the window that are frozen or learn only adapters."""
    copies: int | None = None
    """The stack that new ones may begin as a copy of."""
    trunk: Trunk | None = None
    """Frozen stacks below, if tokens must pass through them first."""


def assemble(
    params: Params,
    members: Sequence[Member],
    ground: Ground,
    *,
    vocab_size: int,
    embeddings_learn: bool,
    reads_tokens: bool,
    unfreeze_steps: int = 0,
    consistency: float = 0.0,
    device: torch.device,
) -> Assembly:
    """Put a window together.

    Head and final norm are carried over from the training before and keep learning. Embeddings learn at the bottom of
    what learns only, and with them a head that is tied to them. Matrices that come from another model are read for the
    first training; of a frozen one the adapter trains in its place.

    Args:
        params: with seed, model, stack, stacks, objective and compute; with trunk where something is quantized, with
            adapters where something has them.
        members: the stacks, bottom to top.
        ground: what there is already.
        vocab_size: V.
        embeddings_learn: whether the embeddings learn here.
        reads_tokens: whether tokens go in, not a cached boundary.
        unfreeze_steps: the steps over which older stacks begin to learn, the topmost first.
        consistency: weight of the consistency term.
        device: where quantized stacks are put.

    Raises:
        UserError: what was trained earlier does not fit, or a pretrained matrix cannot be used.
    """
    builder = _Builder(params, ground, vocab_size, device)
    stacks = [builder.stack(member) for member in members]
    shape = builder.shape(*(m.stack for m in members if m.role in KEPT))
    check_continues(ground.trainings, shape)
    tied = params.model.tie_embeddings or params.objective.embedding_weight > 0
    embeddings, head = builder.ends(
        shape, learn=embeddings_learn, with_embeddings=tied or (reads_tokens and ground.trunk is None)
    )
    unfreezing = None
    if unfreeze_steps:
        downwards = zip(reversed(stacks), reversed(members), strict=True)
        older: list[nn.Module] = [stack for stack, member in downwards if member.role in ("weights", "adapters")]
        if embeddings_learn and embeddings is not None:
            older.append(embeddings)
        unfreezing = Unfreezing(older, unfreeze_steps)
    window = Window(
        stacks,
        head,
        embeddings,
        trunk=ground.trunk,
        consistency=consistency,
        unfreezing=unfreezing,
        checkpointing=params.compute.activation_checkpointing,
        compute=[builder.trunk_compute if m.role in ("frozen", "adapters") else None for m in members],
    )
    return Assembly(window, members, shape, builder.adapters, embeddings_learn)


class _Builder:
    """Builds the parts of one window."""

    def __init__(self, params: Params, ground: Ground, vocab_size: int, device: torch.device) -> None:
        self._params, self._ground, self._device = params, ground, device
        self._vocab_size = vocab_size
        last = ground.trainings[-1] if ground.trainings else None
        self._widths = vocabulary_widths(params.model) if last is None else last.shape.widths
        self.adapters: dict[int, Kind] = {}

    @property
    def trunk_compute(self) -> str:
        """The format of the matrix products of quantized stacks."""
        return self._params.trunk.compute or self._params.compute.dtype

    def shape(self, *stacks: int) -> RackShape:
        """The rack of some stacks."""
        shapes = [
            RackShape.of(
                self._params.stack_model(k), [self._params.stack_params(k).blocks], self._vocab_size, **self._widths
            )
            for k in stacks
        ]
        return replace(shapes[0], stacks=tuple(shape.stacks[0] for shape in shapes))

    def stack(self, member: Member) -> Stack:
        """One stack, as its role wants it."""
        k = member.stack
        match member.role:
            case "new" | "lora":
                stack = self._new(k)
            case "initial":
                stack = self._new(k).requires_grad_(False)
            case "weights":
                stack = latest(self._ground.trainings, k).load_stack()
            case "frozen" | "adapters":
                stack = self._ground.quantized[k].load_stack(self.trunk_compute, self._device)
        if member.role == "lora":
            self._adapt(k, stack, "stack")
        elif member.role == "adapters":
            self._adapt(k, stack, "trunk")
        return stack

    def ends(self, shape: RackShape, *, learn: bool, with_embeddings: bool) -> tuple[Embeddings | None, Head]:
        """The embeddings, if they are wanted, and the head."""
        trainings, seed = self._ground.trainings, self._params.seed
        if trainings:
            embeddings = latest_embeddings(trainings) if with_embeddings or learn else None
            if embeddings is not None and not learn:
                embeddings.requires_grad_(False)
            return embeddings, trainings[-1].load_head(embeddings)
        embeddings = shape.build_embeddings()
        initialize(embeddings, name="embeddings", seed=seed)
        head = shape.build_head(embeddings)
        initialize(head, name="head", seed=seed)
        for matrix in find_matrices(shape.model):
            part = embeddings if matrix.key == "model.embeddings" else head
            part.take(matrix.read(shape.vocab_size))
        return embeddings, head

    def _new(self, k: int) -> Stack:
        """A stack that begins here."""
        stack = self.shape(k).build_stack(0)
        initialize(stack, name=f"stacks.{k}", seed=self._params.seed)
        init = self._params.stack_params(k).init
        if init == "copy" and self._ground.copies is not None:
            copy_blocks(latest(self._ground.trainings, self._ground.copies).load_stack(), stack)
        if init == "zero":
            _zero_outputs(stack)
        return stack

    def _adapt(self, k: int, stack: Stack, kind: Kind) -> None:
        """Give a stack the adapters that learn here: those of an earlier training, or fresh ones."""
        directory = latest_adapters(self._ground.trainings, k)
        if kind == "trunk" and directory is not None:
            lora().load_adapter(stack, kind, directory)
        else:
            lora().adapt(stack, kind, getattr(self._params.adapters, kind), k=k, seed=self._params.seed)
        lora().train_only(stack, [kind])
        self.adapters[k] = kind


def copy_blocks(source: Stack, target: Stack) -> None:
    """Copy weights block by block, beginning again from the lowest where the target has more blocks."""
    for i, block in enumerate(target.blocks):
        block.load_state_dict(source.blocks[i % len(source.blocks)].state_dict())


def _zero_outputs(stack: Stack) -> None:
    """Zero what each block adds to the residual stream: the stack starts as the identity."""
    for name, parameter in stack.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
