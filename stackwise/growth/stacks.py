"""What a training leaves on disk: the stacks that learned, with the head and the embeddings as they were then."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import nn

from stackwise.artifacts.manifest import Artifact
from stackwise.config.growth import Kind
from stackwise.errors import UserError
from stackwise.model.embeddings import Embeddings
from stackwise.model.rack import Head, RackShape
from stackwise.model.stack import Stack
from stackwise.variants import lora

KIND = "stack"
M = TypeVar("M", bound=nn.Module)
HEAD, EMBEDDINGS = "head.safetensors", "embeddings.safetensors"
RETRAIN = "run `dvc repro` or `snakemake`, which train what does not fit again"


@dataclass(frozen=True)
class Training:
    """The artifact of one training, with what can be built from it."""

    artifact: Artifact

    @property
    def stacks(self) -> tuple[int, ...]:
        """The stacks whose weights it holds, bottom to top."""
        return tuple(self.artifact.facts["stacks"])

    @property
    def shape(self) -> RackShape:
        """The rack of these stacks."""
        return RackShape.from_json(self.artifact.facts["shape"])

    @property
    def has_embeddings(self) -> bool:
        """Whether the embeddings have learned in it."""
        return bool(self.artifact.facts["embeddings"])

    def stack(self, k: int) -> "TrainedStack":
        """One of its stacks."""
        return TrainedStack(self, k)

    def adapters_of(self, k: int, kind: Kind) -> Path | None:
        """The directory of adapters of stack `k` that have learned in it; None if none of that kind have."""
        has = self.artifact.facts["adapters"].get(str(k)) == kind
        return self.artifact.path / adapters_directory(k) if has else None

    def load_head(self, embeddings: Embeddings | None) -> Head:
        """The final norm and head; tied to `embeddings` if the model ties them."""
        return _loaded(self.shape.build_head(embeddings), self.artifact.path / HEAD)

    def load_embeddings(self) -> Embeddings:
        """The embeddings, if they have learned in it."""
        return _loaded(self.shape.build_embeddings(), self.artifact.path / EMBEDDINGS)


@dataclass(frozen=True)
class TrainedStack:
    """One stack as a training has left it."""

    training: Training
    index: int

    @property
    def artifact(self) -> Artifact:
        """Of the training."""
        return self.training.artifact

    @property
    def shape(self) -> RackShape:
        """The rack of this one stack."""
        whole = self.training.shape
        return replace(whole, stacks=(whole.stacks[self.training.stacks.index(self.index)],))

    @property
    def lowest(self) -> bool:
        """Whether embeddings that have learned with it belong below it."""
        return self.training.has_embeddings and self.training.stacks[0] == self.index

    def load_stack(self, *, merged: bool = True) -> Stack:
        """The stack in fp32, with a LoRA that it learned as a new stack in its weights or beside them."""
        stack = _loaded(self.shape.build_stack(0), self.artifact.path / stack_file(self.index))
        if (adapters := self.training.adapters_of(self.index, "stack")) is not None:
            lora().load_adapter(stack, "stack", adapters)
            if merged:
                lora().merge(stack)
        return stack

    def load_embeddings(self) -> Embeddings:
        """The embeddings that have learned with it."""
        return self.training.load_embeddings()


def latest(trainings: Iterable[Training], k: int) -> TrainedStack:
    """Stack `k` as the last of `trainings` that holds its weights has left it.

    Raises:
        UserError: none does.
    """
    holding = [training for training in trainings if k in training.stacks]
    if not holding:
        raise UserError(f"stack {k}: none of the trainings given holds its weights; {RETRAIN}")
    return holding[-1].stack(k)


def latest_adapters(trainings: Iterable[Training], k: int) -> Path | None:
    """The directory of the adapters that the last of `trainings` has given stack `k` as part of the trunk."""
    found = [training.adapters_of(k, "trunk") for training in trainings]
    return next((directory for directory in reversed(found) if directory is not None), None)


def latest_embeddings(trainings: Iterable[Training]) -> Embeddings:
    """The embeddings as the last of `trainings` in which they learned has left them.

    Raises:
        UserError: they learned in none.
    """
    holding = [training for training in trainings if training.has_embeddings]
    if not holding:
        raise UserError(f"embeddings: none of the trainings given holds them; {RETRAIN}")
    return holding[-1].load_embeddings()


def check_continues(trainings: Sequence[Training], shape: RackShape) -> None:
    """See to it that what goes on from `trainings` has their architecture and vocabulary.

    Raises:
        UserError: it has not.
    """
    for training in trainings:
        if replace(training.shape, stacks=()) != replace(shape, stacks=()):
            raise UserError(f"{training.artifact.path}: is of another architecture or vocabulary; {RETRAIN}")


def stack_file(k: int) -> str:
    """The file of stack `k` within the artifact of a training."""
    return f"stack_{k}.safetensors"


def adapters_directory(k: int) -> Path:
    """The directory of stack `k`'s adapters within the artifact of a training."""
    return Path("adapters") / str(k)


def _loaded(module: M, file: Path) -> M:
    module.load_state_dict(load_file(file))
    return module
