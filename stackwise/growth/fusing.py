"""From trainings to one rack."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from stackwise.errors import UserError
from stackwise.growth.stacks import RETRAIN, Training, check_continues, latest, latest_embeddings
from stackwise.growth.trunk import AdaptedStack
from stackwise.model.rack import Rack, empty_rack


def fuse(
    trainings: Sequence[Training],
    order: Sequence[int],
    quantized: Mapping[int, AdaptedStack],
    *,
    merged: bool = True,
    entries: Sequence[float] = (),
) -> Rack:
    """The rack of some stacks, each as it was trained last, with the head of the last training.

    Weights come in full precision from the training that made them; below adapters that have learned on quantized
    weights they are what these mean.

    Args:
        trainings: in the order in which they took place.
        order: the stacks, bottom to top.
        quantized: those that have such adapters.
        merged: whether adapters are merged into the weights.
        entries: of the rack's shape.

    Raises:
        UserError: they do not belong together.
    """
    check_continues(trainings, trainings[-1].shape)
    for earlier, later in pairwise(trainings):
        if later.artifact.inputs.get("head") != earlier.artifact.digest:
            raise UserError(
                f"{later.artifact.path}: did not go on from the training in {earlier.artifact.path}; {RETRAIN}"
            )
    shapes = tuple(latest(trainings, k).shape.stacks[0] for k in order)
    rack = empty_rack(replace(trainings[-1].shape, stacks=shapes, entries=tuple(entries)))
    rack.embeddings = latest_embeddings(trainings)
    rack.stacks = nn.ModuleList(
        quantized[k].load_exact(merged=merged) if k in quantized else latest(trainings, k).load_stack(merged=merged)
        for k in order
    )
    rack.head = trainings[-1].load_head(rack.embeddings)
    return rack
