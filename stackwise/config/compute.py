"""Sections `compute`, `trunk` and `activations`: devices, precision, and what is kept on disk."""

from typing import Literal

from pydantic import Field

from stackwise.config.section import Section


class ComputeParams(Section):
    """Where and how the numbers are computed."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto` takes CUDA, then MPS, then the CPU."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format of matrix products (autocast); weights and optimizer state stay fp32. fp16 on a CPU is slow."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of the stages that follow one another: training and caching stacks."""
    branch_threads: int = Field(default=1, ge=1)
    """CPU threads of the stages that run beside one another: fine-tuning and evaluation."""
    deterministic: bool = True
    """Only deterministic algorithms: the same bytes again on the same machine."""
    compile: bool = False
    """Compile the trained modules with `torch.compile`."""


class TrunkParams(Section):
    """The frozen stacks below the one that trains."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Format in which the trunk's weights are stored while stacks train on top of it."""
    activations: Literal["fp32", "bf16"] = "bf16"
    """Format of the cached activations."""


class ActivationsParams(Section):
    """The activation cache on disk. Changes no result."""

    directory: str = ".stackwise/activations"
    """Where the stores lie; a fast local disk serves best."""
    budget_gb: float = Field(default=50.0, gt=0)
    """Most disk space of all stores (10^9 bytes); the least recently used go first."""
    shard_mb: int = Field(default=16, ge=1)
    """Size of a shard file (2^20 bytes); a store with shards of another size is made again."""
    prefetch: int = Field(default=4, ge=1)
    """Batches that the loader keeps ready."""
