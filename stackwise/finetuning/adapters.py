"""A finished rack that learns a task by adapters alone, on weights as they are (LoRA) or quantized (QLoRA)."""

from pathlib import Path

import torch
from torch import nn

from stackwise.adapters import lora
from stackwise.config.tuning import FineTuneParams
from stackwise.growth.racks import load_rack
from stackwise.model.rack import Rack
from stackwise.model.stack import Stack
from stackwise.precision import formats


def load_adapted(directory: Path, branch: FineTuneParams, *, key: str, seed: int, device: torch.device) -> Rack:
    """A rack with fresh adapters on its stacks, which alone learn. It computes what it did, but for the quantization.

    Stacks are read and quantized one after the other: never are two in fp32 in memory, and none while it trains.

    Args:
        directory: of the rack.
        branch: with method `lora` or `qlora`.
        key: the parameter that `branch` is; adapters begin as is right for this name and the seed.
        seed: of the pipeline.
        device: that will compute.

    Raises:
        UserError: it cannot compute with the format, or the rack has no projection of a name in `target_modules`.
    """
    settings = branch.adapters
    assert settings is not None, branch.method
    quantizes = branch.method == "qlora"
    if quantizes:
        formats.check_precision(branch.precision, device, key=f"{key}.precision")

    def quantized(stack: Stack) -> None:
        formats.quantize(stack, branch.precision)

    rack = load_rack(directory, hold=quantized if quantizes else None).requires_grad_(False)
    for place, stack in enumerate(rack.stacks):
        assert isinstance(stack, Stack)
        lora.adapt(stack, "task", settings, k=place, seed=seed, key=f"{key}.lora")
        lora.train_only(stack, ["task"])
    return rack


def finish(model: nn.Module, *, merge: bool) -> None:
    """Bring a model that has learned by adapters to fp32, in place.

    Args:
        model: whose `stacks` are those of a rack with adapters, on the CPU.
        merge: whether adapters go into the weights; if not, they stay beside what the quantized weights mean.
    """
    for stack in model.get_submodule("stacks").children():
        assert isinstance(stack, Stack)
        lora.merge(stack) if merge else formats.dequantize(stack)
