"""The table of architecture variants: which file holds which; and where adapters are.

An entry here, a value in the type of its parameter (`stackwise.config.model`) and a file are all that a variant needs.
Light on purpose: it imports no torch. Files are named so that the pipeline can watch those that a stack uses, and no
others: an edit of one variant invalidates nothing that another has made.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from stackwise.config.model import ModelParams


@dataclass(frozen=True)
class Variant:
    """Where a variant is."""

    module: str
    """The module within its package that holds the class."""
    name: str
    """Of the class."""
    uses: tuple[str, ...] = ()
    """The other modules of the package that it imports, directly or not."""


ATTENTION = {
    "standard": Variant("dense", "DenseAttention"),
    "gqa": Variant("dense", "DenseAttention"),
    "mla": Variant("latent", "LatentAttention", uses=("dense",)),
    "kernel": Variant("kernel", "KernelAttention", uses=("dense", "features", "linear")),
    "mlgka": Variant(
        "latent_kernel", "LatentKernelAttention", uses=("dense", "features", "kernel", "latent", "linear")
    ),
}
"""Of each value of `model.attention.type`, in `stackwise/attention`."""
MLP = {
    "swiglu": Variant("swiglu", "SwiGLU"),
    "moe": Variant("moe", "MixtureOfExperts", uses=("swiglu",)),
}
"""Of each value of `model.mlp.type`, in `stackwise/mlp`."""
_PACKAGES = {"attention": ATTENTION, "mlp": MLP}


def variant_of(package: str, type_: str) -> Variant:
    """Where the variant `model.<package>.type` is."""
    return _PACKAGES[package][type_]


def class_of(package: str, type_: str) -> Any:
    """The class of a variant; its module is imported now.

    Args:
        package: `attention` or `mlp`.
        type_: value of `model.<package>.type`.
    """
    variant = variant_of(package, type_)
    return getattr(import_module(f"stackwise.{package}.{variant.module}"), variant.name)


def sources(models: Iterable[ModelParams]) -> tuple[str, ...]:
    """The files that hold the variants of some stacks' architectures, relative to the project."""
    found = set()
    for model in models:
        for package, type_ in (("attention", model.attention.type), ("mlp", model.mlp.type)):
            variant = variant_of(package, type_)
            found |= {f"stackwise/{package}/{module}.py" for module in (variant.module, *variant.uses)}
    return tuple(sorted(found))


ADAPTERS = ("stackwise/adapters", "stackwise/config/growth.py", "stackwise/growth/init.py", "stackwise/precision")
"""The files that give stacks adapters, relative to the project."""


def lora() -> Any:
    """The module of adapters. It is imported now: that takes seconds, and a pipeline without adapters must not depend
    on it."""
    return import_module("stackwise.adapters.lora")


TASK_ADAPTERS = (*ADAPTERS, "stackwise/finetuning/adapters.py")
"""Likewise, those that fine-tune racks by adapters."""


def adapted_racks() -> Any:
    """The module of racks that are fine-tuned by adapters; imported now, as that of `lora`."""
    return import_module("stackwise.finetuning.adapters")
