"""Whole racks on disk: fused and fine-tuned models."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from stackwise.model.rack import Rack, RackShape, empty_rack

KIND = "rack"
WEIGHTS, SHAPE, TOKENIZER = "model.safetensors", "rack.json", "tokenizer"


def save_rack(directory: Path, rack: Rack, tokenizer: Path) -> None:
    """Write `model.safetensors` (fp32; a tied head is not stored twice), `rack.json` and a copy of the tokenizer."""
    save_file(rack.state_dict(), directory / WEIGHTS)
    shutil.copytree(tokenizer, directory / TOKENIZER)
    (directory / SHAPE).write_text(json.dumps(rack.shape.to_json(), indent=1, sort_keys=True) + "\n")


def load_rack(directory: Path) -> Rack:
    """The rack that `save_rack` wrote, in fp32."""
    rack = empty_rack(RackShape.from_json(json.loads((directory / SHAPE).read_text())))
    # assign keeps requires_grad as the modules have set it
    rack.load_state_dict(load_file(directory / WEIGHTS), assign=True)
    return rack
