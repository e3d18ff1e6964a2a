"""Whole racks on disk: fused and fine-tuned models."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from stackwise.model.rack import Rack, RackShape, empty_rack
from stackwise.variants import lora

KIND = "rack"
WEIGHTS, SHAPE, TOKENIZER, ADAPTERS = "model.safetensors", "rack.json", "tokenizer", "adapters"


def save_rack(directory: Path, rack: Rack, tokenizer: Path) -> None:
    """Write `model.safetensors` (fp32; a tied head is not stored twice), `rack.json` and a copy of the tokenizer.

    Adapters that are not merged go to `adapters/<place of the stack>/<kind>`, in PEFT's format.
    """
    weights = rack.state_dict()
    for place, stack in enumerate(rack.stacks):
        if any(".lora_" in name for name, _ in stack.named_parameters()):
            prefix = f"stacks.{place}."
            weights = {name: w for name, w in weights.items() if not name.startswith(prefix)}
            weights |= {prefix + name: w for name, w in lora().base_weights(stack).items()}
            for kind in lora().kinds_of(stack):
                lora().save_adapter(stack, kind, directory / ADAPTERS / str(place))
    save_file(weights, directory / WEIGHTS)
    shutil.copytree(tokenizer, directory / TOKENIZER)
    (directory / SHAPE).write_text(json.dumps(rack.shape.to_json(), indent=1, sort_keys=True) + "\n")


def facts_of(rack: Rack, *, objective: str, causal: bool, seq_len: int) -> dict[str, Any]:
    """What a rack's manifest says of it.

    Args:
        rack: the model.
        objective: what it has learned: `clm`, `mlm`, `diffusion` or `custom`.
        causal: whether its positions see only those before them.
        seq_len: length of the samples that it has learned from (tokens).
    """
    return {"shape": rack.shape.to_json(), "objective": objective, "causal": causal, "seq_len": seq_len}


def load_rack(directory: Path) -> Rack:
    """The rack that `save_rack` wrote, in fp32, its adapters merged."""
    rack = empty_rack(RackShape.from_json(json.loads((directory / SHAPE).read_text())))
    # assign keeps requires_grad as the modules have set it
    rack.load_state_dict(load_file(directory / WEIGHTS), assign=True)
    for adapters in sorted((directory / ADAPTERS).glob("*/*")):
        stack = rack.stacks[int(adapters.parent.name)]
        lora().load_adapter(stack, adapters.name, adapters.parent)
        lora().merge(stack)
    return rack
