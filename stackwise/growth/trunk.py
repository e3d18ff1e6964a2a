"""Frozen stacks with the adapters that they have learned as part of the trunk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stackwise.artifacts.manifest import Artifact, digest_json
from stackwise.growth.stacks import Training
from stackwise.model.stack import Stack
from stackwise.precision.formats import dequantize
from stackwise.precision.trunk import TrunkStack
from stackwise.variants import lora


@dataclass(frozen=True)
class AdaptedStack(TrunkStack):
    """A quantized stack with adapters that have learned on it."""

    directory: Path
    """Where the adapters lie."""
    training: Training
    """The training that has left them so."""

    @property
    def digest(self) -> str:
        """Identity of its weights and adapters (hex)."""
        return digest_json([self.artifact.digest, self.training.artifact.digest])

    def load_stack(self, compute_dtype: str, device: torch.device) -> Stack:
        """As of a stack without adapters; these are frozen too."""
        stack = super().load_stack(compute_dtype, device)
        lora().load_adapter(stack, "trunk", self.directory)
        return stack.requires_grad_(False).eval()

    def load_exact(self, *, merged: bool) -> Stack:
        """The stack in fp32: what its quantized weights mean, with the adapters in them or beside them."""
        stack = self.load_stack("fp32", torch.device("cpu"))
        lora().merge(stack) if merged else dequantize(stack)
        return stack


def trunk_of(artifacts: Iterable[Artifact], trainings: Sequence[Training] = ()) -> list[TrunkStack]:
    """The stacks of trunk artifacts, in their order, with the adapters that the last of `trainings` has for each."""
    return [_with_adapters(TrunkStack(artifact), trainings) for artifact in artifacts]


def adapted_stacks(artifacts: Iterable[Artifact], trainings: Sequence[Training]) -> dict[int, AdaptedStack]:
    """Those stacks of trunk artifacts that have learned adapters, by number."""
    stacks = trunk_of(artifacts, trainings)
    return {stack.index: stack for stack in stacks if isinstance(stack, AdaptedStack)}


def _with_adapters(stack: TrunkStack, trainings: Sequence[Training]) -> TrunkStack:
    for training in reversed(trainings):
        if (directory := training.adapters_of(stack.index, "trunk")) is not None:
            return AdaptedStack(stack.artifact, directory, training)
    return stack
