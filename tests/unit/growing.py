"""Racks that grow without the pipeline around them: windows put together and published as its scripts do it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from stackwise.artifacts import manifest
from stackwise.config.compute import Precision
from stackwise.config.params import Params
from stackwise.growth.assembly import Assembly, Ground, assemble
from stackwise.growth.phases import Member
from stackwise.growth.stacks import TrainedStack, Training
from stackwise.growth.window import Trunk
from stackwise.precision.trunk import TrunkStack, quantize_stack

CPU = torch.device("cpu")


def params_with(**sections: Any) -> Params:
    """Parameters of which only some sections are not at their defaults."""
    tree: dict[str, Any] = {name: {} for name in Params.model_fields}
    tree |= {"seed": 0, "seq_len": 16, "n_stacks": 4, "stacks": [], "stack": {"blocks": 1}, **sections}
    return Params.model_validate(tree)


def window_of(
    params: Params,
    members: str,
    trainings: Sequence[Training] = (),
    *,
    vocab_size: int,
    quantized: Iterable[TrunkStack] = (),
    copies: int | None = None,
    trunk: Trunk | None = None,
    embeddings_learn: bool = False,
    reads_tokens: bool = True,
    **options: Any,
) -> Assembly:
    """A window with `members` such as `0=weights 1=new`, bottom to top, on the ground of some trainings."""
    parsed = [Member(int(stack), role) for stack, role in (word.split("=") for word in members.split())]  # type: ignore[arg-type]
    return assemble(
        params,
        parsed,
        Ground(trainings, {stack.index: stack for stack in quantized}, copies, trunk),
        vocab_size=vocab_size,
        embeddings_learn=embeddings_learn,
        reads_tokens=reads_tokens,
        device=CPU,
        **options,
    )


def published(directory: Path, assembly: Assembly, trainings: Sequence[Training] = ()) -> Training:
    """The artifact of a window that went on from `trainings`."""
    inputs = {"head": trainings[-1].artifact} if trainings else {}
    with manifest.publish(directory, kind="stack", params={}, inputs=inputs) as draft:
        draft.facts |= assembly.save(draft.directory)
    return Training(manifest.read(directory, "stack"))


def quantized(stack: TrainedStack, directory: Path, precision: Precision) -> TrunkStack:
    """The artifact of a stack in the trunk."""
    inputs = {"training": stack.artifact}
    with manifest.publish(directory, kind="trunk", params={"precision": precision}, inputs=inputs) as draft:
        draft.facts |= quantize_stack(stack, draft.directory, precision)
    return TrunkStack(manifest.read(directory, "trunk"))
