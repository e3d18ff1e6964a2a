"""The adapters of a rack as PEFT adapters of its model in Transformers.

A rack keeps those of each stack by themselves. For the whole model those of one kind are one adapter; where ranks or
alphas differ from stack to stack, its patterns say so.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stackwise.huggingface.tensors import Source, read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def adapted_projections(source: Path) -> set[str]:
    """The names of the projections that have adapters, such as `q_proj`; see `write_adapters`."""
    configs = [json.loads((part / CONFIG).read_text(encoding="utf-8")) for part in source.glob("*/*")]
    return {name for config in configs for name in config["target_modules"]}


def write_adapters(source: Path, directory: Path, rename: Callable[[str], str]) -> tuple[str, ...]:
    """Write the adapters of a rack.

    Args:
        source: where they lie, as `<place of the stack>/<kind>`.
        directory: where they go, as `<kind>`.
        rename: a projection's name in the rack (`stacks.0.blocks.0.attention.q_proj`) to that in the model.

    Returns:
        The kinds that there are.
    """
    kinds = sorted({path.name for path in source.glob("*/*")})
    for kind in kinds:
        (directory / kind).mkdir(parents=True)
        _write(sorted(source.glob(f"*/{kind}"), key=lambda path: int(path.parent.name)), directory / kind, rename)
    return tuple(kinds)


def _write(parts: list[Path], directory: Path, rename: Callable[[str], str]) -> None:
    configs = [json.loads((part / CONFIG).read_text(encoding="utf-8")) for part in parts]
    common, tensors = dict(configs[0]), dict[str, Source]()
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for part, config in zip(parts, configs, strict=True):
        for projection, name, tensor in _tensors(part, rename):
            tensors[f"{_PREFIX}{projection}.{name}"] = tensor
            if projection not in targets:
                targets.append(projection)
            # PEFT takes a pattern for a regular expression that ends a name.
            if config["r"] != common["r"]:
                ranks[re.escape(projection)] = config["r"]
            if config["lora_alpha"] != common["lora_alpha"]:
                alphas[re.escape(projection)] = config["lora_alpha"]
    common |= {"target_modules": sorted(targets), "rank_pattern": ranks, "alpha_pattern": alphas}
    common |= {"inference_mode": True, "base_model_name_or_path": None}
    (directory / CONFIG).write_text(json.dumps(common, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(directory / WEIGHTS, tensors)


def _tensors(part: Path, rename: Callable[[str], str]) -> Iterator[tuple[str, str, Source]]:
    """Of each tensor the projection that it belongs to, its name there, and itself."""
    for name, tensor in read_tensors(part / WEIGHTS).items():
        path, matrix = name.removeprefix(_PREFIX).split(".lora_")
        projection: Any = rename(f"stacks.{part.parent.name}.{path}")
        yield projection, f"lora_{matrix}", tensor
