"""Checkpoints: what an interrupted stage resumes from."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint file of one run; only the newest state is kept.

    It lies outside the stage's declared outputs, under a name made of its inputs, parameters and code, so that no run
    picks up another's state.
    """

    file: Path

    def save(
        self, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, facts: dict[str, Any]
    ) -> None:
        """Write the state after `step` steps; it replaces the former one whole.

        Args:
            step: steps done.
            parameters: what trains, by name.
            optimizer: its state is kept for each of them.
            facts: JSON values to get back on resuming.
        """
        tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            tensors |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        text = json.dumps({"step": step, **facts})
        save_file(tensors, partial, metadata={"facts": text, "sha256": _digest(tensors, text)})
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.replace(self.file)

    def load(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, Any]]:
        """Put the newest state back in place.

        Returns:
            Steps done and the facts that were saved; (0, {}) if there is no checkpoint that can be read.
        """
        states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        try:
            with safe_open(self.file, framework="pt") as f:
                metadata = f.metadata()
                tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (it is no mapping)
            if _digest(tensors, metadata["facts"]) != metadata["sha256"]:
                return 0, {}
            for key, value in tensors.items():
                kind, name = key.split("/", 1)
                states[name][kind] = value
            facts = json.loads(metadata["facts"])
            step = facts.pop("step")
            values = {name: states[name].pop("parameter") for name in parameters}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # none, or damaged: start over
            return 0, {}
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(values[name])
            optimizer.state[parameter] = {kind: value.to(parameter.device) for kind, value in states[name].items()}
        return step, facts

    def discard(self) -> None:
        """Remove it: the stage has published its result."""
        self.file.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of what a checkpoint holds (hex): safetensors itself has no checksum of its data."""
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
