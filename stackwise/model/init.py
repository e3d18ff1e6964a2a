"""Initial weights: a function of (seed, parameter name, shape) alone."""

import hashlib

import torch
from torch import Tensor, nn

EMBEDDING_STD = 0.005


def initialize(module: nn.Module, *, name: str, seed: int) -> None:
    """Draw all weights of `module` in place; norms become ones.

    Matrices are normal with standard deviation `d_in ** -0.5`, embeddings with `EMBEDDING_STD`.

    Args:
        name: what the module is called in a rack (`stacks.2`, `head`, `embeddings`): the same name, seed and shape give
            the same weights, whatever else is built, in whatever order.
        seed: of the pipeline.
    """
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = EMBEDDING_STD if isinstance(module, nn.Embedding) else parameter.shape[1] ** -0.5
                parameter.copy_(_normal(f"{name}.{parameter_name}", parameter.shape, seed) * std)


def _normal(name: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{tuple(shape)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator)
