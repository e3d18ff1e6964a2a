"""The trunk: trained stacks in the format in which they serve as frozen ground for the next."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stackwise.artifacts.manifest import Artifact
from stackwise.growth.stacks import TrainedStack
from stackwise.model.embeddings import Embeddings
from stackwise.model.frozen import FrozenLinear
from stackwise.model.rack import RackShape
from stackwise.model.stack import Stack
from stackwise.precision.dtypes import DTYPES

KIND = "trunk"
_STACK, _EMBEDDINGS = "stack.safetensors", "embeddings.safetensors"


def quantize_stack(stack: TrainedStack, directory: Path, dtype: str) -> dict[str, Any]:
    """Write a stack's matrices (and, for stack 0, the embeddings) as `dtype`; norms stay fp32.

    Returns:
        Facts: index, shape, dtype, and `relative_error`, the Frobenius norm of what rounding has changed over that of
        the weights.
    """
    parts = {_STACK: stack.load_stack().state_dict()}
    if stack.index == 0:
        parts[_EMBEDDINGS] = stack.load_embeddings().state_dict()
    changed = total = 0.0
    for file, weights in parts.items():
        rounded = {name: w.to(DTYPES[dtype]) if w.ndim > 1 else w for name, w in weights.items()}
        save_file(rounded, directory / file)
        numbers = {name: w for name, w in weights.items() if w.is_floating_point()}  # not the seeds of frozen features
        changed += sum(_square(rounded[name].float() - w) for name, w in numbers.items())
        total += sum(_square(w) for w in numbers.values())
    return {
        "index": stack.index,
        "shape": stack.artifact.facts["shape"],
        "dtype": dtype,
        "relative_error": (changed / total) ** 0.5,
    }


@dataclass(frozen=True)
class TrunkStack:
    """A quantized stack's artifact, with what can be built from it."""

    artifact: Artifact

    @property
    def shape(self) -> RackShape:
        """The rack of this one stack."""
        return RackShape.from_json(self.artifact.facts["shape"])

    def load_stack(self, compute_dtype: str, device: torch.device) -> Stack:
        """The stack, frozen, its matrices in the format that computes."""
        with torch.device("meta"):
            stack = self.shape.build_stack(0)
        return _loaded(stack, self.artifact.path / _STACK, compute_dtype, device)

    def load_embeddings(self, device: torch.device) -> Embeddings:
        """The embeddings, frozen, in fp32 (only stack 0 has them)."""
        with torch.device("meta"):
            embeddings = self.shape.build_embeddings()
        return _loaded(embeddings, self.artifact.path / _EMBEDDINGS, "fp32", device)


def _loaded(module: Any, file: Path, dtype: str, device: torch.device) -> Any:
    weights = {name: (w.to(DTYPES[dtype]) if w.ndim > 1 else w).to(device) for name, w in load_file(file).items()}
    module.load_state_dict(weights, assign=True)
    for part in module.modules():
        if isinstance(part, FrozenLinear):
            part.to(DTYPES[dtype])
    return module.requires_grad_(False).eval()


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
