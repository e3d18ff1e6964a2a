"""The trunk: trained stacks in the format in which they serve as frozen ground for the next."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stackwise.artifacts.manifest import Artifact
from stackwise.config.compute import Precision
from stackwise.errors import UserError
from stackwise.growth.stacks import TrainedStack
from stackwise.model.embeddings import Embeddings
from stackwise.model.frozen import FrozenLinear
from stackwise.model.rack import RackShape
from stackwise.model.stack import Stack
from stackwise.precision import formats
from stackwise.precision.dtypes import DTYPES
from stackwise.precision.sizes import at_least_16_bits
from stackwise.precision.stored import StoredLinear

KIND = "trunk"
_STACK, _EMBEDDINGS = "stack.safetensors", "embeddings.safetensors"
_DTYPES = {"full": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
_OF_COMPUTE: dict[str, Precision] = {"bf16": "bfloat16", "fp16": "half"}


def quantize_stack(stack: TrainedStack, directory: Path, precision: Precision) -> dict[str, Any]:
    """Write a stack in a format; with embeddings that learned with it, of which the matrices keep 16 bits at least.

    Made on the CPU by one thread: the same bytes for whatever device computes with them, and on whatever machine.

    Returns:
        Facts: index, shape, precision; `relative_error`, the Frobenius norm of what the format has changed over that of
        the weights; `bytes` that the stack takes in memory in this format, without the embeddings.

    Raises:
        UserError: this machine cannot make the format, or the format cannot hold the weights.
    """
    formats.check_precision(precision, torch.device("cpu"))
    with _one_thread():
        module = stack.load_stack()
        exact = dict(module.named_parameters())
        formats.quantize(module, precision)
        formats.save(module, directory / _STACK)
        total = sum(map(_square, exact.values()))
        changed = sum(
            _square(part.matrix(torch.float32) - exact[f"{name}.weight"])
            for name, part in module.named_modules()
            if isinstance(part, StoredLinear)
        )
        if stack.lowest:
            dtype = _DTYPES[at_least_16_bits(precision)]
            weights = stack.load_embeddings().state_dict()
            rounded = {name: w.to(dtype) if w.ndim > 1 else w for name, w in weights.items()}
            save_file(rounded, directory / _EMBEDDINGS)
            total += sum(map(_square, weights.values()))
            changed += sum(_square(rounded[name].float() - w) for name, w in weights.items())
    error = (changed / total) ** 0.5
    if not math.isfinite(error):
        raise UserError(
            f"params.yaml: trunk.precision = {precision}: cannot hold the weights of stack {stack.index} "
            f"({stack.artifact.path}), some of which are too large or not finite; set it, or "
            f"trunk.precisions.{stack.index}, to bfloat16 or full, and check that the training has not diverged"
        )
    return {
        "index": stack.index,
        "shape": stack.shape.to_json(),
        "precision": precision,
        "relative_error": error,
        "bytes": formats.memory(module),
    }


@dataclass(frozen=True)
class TrunkStack:
    """A quantized stack's artifact, with what can be built from it."""

    artifact: Artifact

    @property
    def digest(self) -> str:
        """Identity of its weights and of how they were made (hex)."""
        return self.artifact.digest

    @property
    def index(self) -> int:
        """Which stack it is, in the order in which they are added."""
        return int(self.artifact.facts["index"])

    @property
    def precision(self) -> Precision:
        """The format of its weights."""
        precision: Precision = self.artifact.facts["precision"]
        return precision

    @cached_property
    def shape(self) -> RackShape:
        """The rack of this one stack."""
        return RackShape.from_json(self.artifact.facts["shape"])

    def load_stack(self, compute_dtype: str, device: torch.device) -> Stack:
        """The stack, frozen; its weights are those in the artifact, on a CPU the very file.

        Matrices of 16 or 32 bits are rounded to the format that computes, unless that has more bits: then, as those of
        fewer, they are decoded for each product, so that no matrix is in memory in two formats but the one in use.

        Args:
            compute_dtype: format of the products (a key of `DTYPES`); run the stack under `autocast` with it.
            device: where the stack is to be.

        Raises:
            UserError: the device or the machine cannot compute with the format.
        """
        formats.check_precision(self.precision, device)
        with torch.device("meta"):
            stack = self.shape.build_stack(0)
        for part in stack.modules():
            if isinstance(part, FrozenLinear):
                part.to(DTYPES[compute_dtype])
        formats.load(stack, self.artifact.path / _STACK, self.precision, device, held=self._held(compute_dtype))
        return stack.requires_grad_(False).eval()

    def load_embeddings(self, device: torch.device) -> Embeddings:
        """The embeddings that learned with the stack, frozen, in fp32."""
        with torch.device("meta"):
            embeddings = self.shape.build_embeddings()
        formats.load(
            embeddings, self.artifact.path / _EMBEDDINGS, at_least_16_bits(self.precision), device, held="full"
        )
        return embeddings.requires_grad_(False).eval()

    def _held(self, compute_dtype: str) -> Precision:
        """The format in memory."""
        if self.precision not in _DTYPES:
            return self.precision
        return _OF_COMPUTE.get(compute_dtype, self.precision)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More would add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _square(x: Tensor) -> float:
    return float(x.detach().double().square().sum())
