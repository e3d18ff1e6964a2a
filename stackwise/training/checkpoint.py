"""Checkpoints: a run that was interrupted goes on and ends in the same bits."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stackwise.errors import UserError


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint file of one run: the newest state, and the best weights if they are older.

    It lies outside the stage's declared outputs, under a name made of its inputs, parameters and code, so that no run
    picks up another's state.
    """

    file: Path

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        facts: dict[str, Any],
        *,
        best: int | None = None,
    ) -> None:
        """Write the state after `step` steps; it replaces the former one whole.

        Args:
            step: steps done.
            parameters: what trains, by name.
            optimizer: its state is kept for each of them.
            facts: JSON values to get back on resuming.
            best: the step after which the parameters were the best so far, if these are to be kept. If it is not
                `step`, the former checkpoint has them.

        Raises:
            UserError: the former checkpoint is gone or damaged, and with it the best parameters.
        """
        tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            tensors |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
        if best is not None and best != step:
            tensors |= {f"best/{name}": value for name, value in self._best(parameters).items()}
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
            tensors, facts = self._read()
            for key, value in tensors.items():
                kind, name = key.split("/", 1)
                states[name][kind] = value
            step = facts.pop("step")
            values = {name: states[name].pop("parameter") for name in parameters}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # none, or damaged: start over
            return 0, {}
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(values[name])
            states[name].pop("best", None)
            optimizer.state[parameter] = {kind: value.to(parameter.device) for kind, value in states[name].items()}
        return step, facts

    def restore_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give `parameters` the values that the checkpoint keeps as the best.

        Raises:
            UserError: it is gone or damaged.
        """
        with torch.no_grad():
            for name, value in self._best(parameters).items():
                parameters[name].copy_(value)

    def discard(self) -> None:
        """Remove it: the stage has published its result."""
        self.file.unlink(missing_ok=True)

    def _best(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters that were best when the file was written: those of that step, unless older ones are there."""
        try:
            tensors, _ = self._read()
            return {name: tensors.get(f"best/{name}", tensors[f"parameter/{name}"]) for name in names}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.file}: went missing or was damaged while training, and with it the best weights ({error}); "
                "run again, which trains from the start"
            ) from None

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the file holds; on a CPU the tensors are the file itself, mapped into memory."""
        with safe_open(self.file, framework="pt") as f:
            metadata = f.metadata()
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (it is no mapping)
        if _digest(tensors, metadata["facts"]) != metadata["sha256"]:
            raise ValueError("its checksum is another")
        return tensors, json.loads(metadata["facts"])


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of what a checkpoint holds (hex): safetensors itself has no checksum of its data."""
    hasher = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
