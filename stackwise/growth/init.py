"""Initial weights: a function of (seed, parameter name, shape) alone."""

import hashlib

import torch
from torch import Tensor, nn

from stackwise.model.embeddings import Embeddings
from stackwise.model.frozen import FrozenRandom
from stackwise.model.time import Modulation

EMBEDDING_STD = 0.005


def initialize(module: nn.Module, *, name: str, seed: int) -> None:
    """Draw all weights of `module` in place.

    Matrices are normal with standard deviation `d_in ** -0.5`, embeddings with `EMBEDDING_STD`; norms are ones, biases
    and modulations zeros; frozen random tensors get a seed of their own.

    Args:
        module: what is drawn.
        name: what the module is called in a rack (`stacks.2`, `head`, `embeddings`): the same name, seed and shape give
            the same weights, whatever else is built, in whatever order, on whatever device.
        seed: of the pipeline.
    """
    with torch.no_grad():
        for path, part in module.named_modules():
            full = f"{name}.{path}" if path else name
            if isinstance(part, FrozenRandom):
                part.reseed(_derived(full, seed))
            for parameter_name, parameter in part.named_parameters(recurse=False):
                if parameter_name == "bias" or isinstance(part, Modulation):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    std = EMBEDDING_STD if isinstance(part, Embeddings) else parameter.shape[1] ** -0.5
                    parameter.copy_(_normal(f"{full}.{parameter_name}", parameter.shape, seed) * std)


def _normal(name: str, shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(_derived(f"{name}/{tuple(shape)}", seed))
    return torch.randn(shape, generator=generator)


def _derived(name: str, seed: int) -> int:
    """A seed of 63 bits for what is called `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
