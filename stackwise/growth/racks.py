"""Whole racks on disk: fused and fine-tuned models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from stackwise.model.rack import Rack, RackShape, empty_rack
from stackwise.model.stack import Stack
from stackwise.variants import lora

KIND = "rack"
WEIGHTS, SHAPE, TOKENIZER, ADAPTERS = "model.safetensors", "rack.json", "tokenizer", "adapters"


def save_rack(directory: Path, rack: Rack, tokenizer: Path) -> None:
    """Write `model.safetensors` (fp32; a tied head is not stored twice), `rack.json` and a copy of the tokenizer.

    Adapters that are not merged go to `adapters/<place of the stack>/<kind>`, in PEFT's format.
    """
    save_weights(directory, rack)
    shutil.copytree(tokenizer, directory / TOKENIZER)
    (directory / SHAPE).write_text(json.dumps(rack.shape.to_json(), indent=1, sort_keys=True) + "\n")


def load_rack(directory: Path, *, hold: Callable[[Stack], None] | None = None) -> Rack:
    """The rack that `save_rack` wrote, in fp32, its adapters merged.

    Args:
        directory: where it lies.
        hold: what to do with each stack as soon as it is there, before the next one is read, such as to quantize it.
    """
    rack = empty_rack(shape_of(directory))
    load_weights(rack, directory, hold=hold)
    return rack


def shape_of(directory: Path) -> RackShape:
    """The shape of a saved rack."""
    return RackShape.from_json(json.loads((directory / SHAPE).read_text()))


def save_weights(directory: Path, model: nn.Module) -> None:
    """Write the weights and the adapters of a model whose `stacks` are those of a rack."""
    weights = model.state_dict()
    for place, stack in enumerate(_stacks(model)):
        if any(".lora_" in name for name, _ in stack.named_parameters()):
            prefix = f"stacks.{place}."
            weights = {name: w for name, w in weights.items() if not name.startswith(prefix)}
            weights |= {prefix + name: w for name, w in lora().base_weights(stack).items()}
            for kind in lora().kinds_of(stack):
                lora().save_adapter(stack, kind, directory / ADAPTERS / str(place))
    # what was quantized may have been decoded in another order
    save_file({name: w.contiguous() for name, w in weights.items()}, directory / WEIGHTS)


def facts_of(rack: Rack, *, objective: str, causal: bool, seq_len: int) -> dict[str, Any]:
    """What a rack's manifest says of it.

    Args:
        rack: the model.
        objective: what it has learned: `clm`, `mlm`, `diffusion` or `custom`.
        causal: whether its positions see only those before them.
        seq_len: length of the samples that it has learned from (tokens).
    """
    return {"shape": rack.shape.to_json(), "objective": objective, "causal": causal, "seq_len": seq_len}


def load_weights(model: nn.Module, directory: Path, *, hold: Callable[[Stack], None] | None = None) -> None:
    """Load what `save_weights` wrote into a model without memory for its weights, as `load_rack` does."""
    stacks = {f"stacks.{place}": stack for place, stack in enumerate(_stacks(model))}
    parts = {**{name: part for name, part in model.named_children() if name != "stacks"}, **stacks}
    # Mapped into memory, the file would stay there as a whole as long as anything of it is used.
    with safe_open(directory / WEIGHTS, framework="pt", backend="mmap" if hold is None else "pread") as file:
        names = list(file.keys())
        for path, part in parts.items():
            own = {name.removeprefix(f"{path}."): name for name in names if name.startswith(f"{path}.")}
            # assign keeps requires_grad as the modules have set it
            part.load_state_dict({short: file.get_tensor(name) for short, name in own.items()}, assign=True)
            if path not in stacks:
                continue
            for adapters in sorted((directory / ADAPTERS / path.removeprefix("stacks.")).glob("*")):
                lora().load_adapter(part, adapters.name, adapters.parent)
                lora().merge(part)
            if hold is not None:
                hold(stacks[path])


def _stacks(model: nn.Module) -> list[Stack]:
    return list(model.get_submodule("stacks").children())  # type: ignore[arg-type]
