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
    activation_checkpointing: bool = False
    """Keep only what goes into each block, and compute the rest again in the backward pass: less memory, about a third
    more time (Chen et al. 2016)."""


Precision = Literal["full", "half", "bfloat16", "int8", "fp8", "fp4", "nf4", "nvfp4"]


class TrunkParams(Section):
    """The stacks that are trained already, as the one that trains sees them."""

    precision: Precision = "bfloat16"
    """Format in which the trunk's weights are kept, on disk and in memory. Below 16 bits it saves memory, not time."""
    precisions: list[Precision | None] = Field(default=[])
    """Format of single stacks, in the order in which they are added; null, or none given: `precision`."""
    compute: Literal["fp32", "bf16", "fp16"] | None = None
    """Format of the trunk's matrix products (null: `compute.dtype`)."""
    activations: Literal["fp32", "bf16", "int8", "fp8"] = "bf16"
    """Format of the cached activations. int8 has a scale for every 64 channels, fp8 (e4m3) one for every token."""

    def precision_of(self, k: int) -> Precision:
        """The format of stack `k`."""
        own = self.precisions[k] if k < len(self.precisions) else None
        return own or self.precision


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
    store_all_time_steps: bool = True
    """Whether the activations of all `objective.variants` time steps of a sample (a mask rate t and a mask, each with t
    from another part of its range) are on disk at the same time. If not, `time_step_cache_size` are."""
    time_step_cache_size: int = Field(default=1, ge=1)
    """Time steps of each sample whose activations are on disk at the same time, without `store_all_time_steps`; others
    take their place when training comes to them."""
    trunk: Literal["stream", "resident"] = "stream"
    """Where nothing is cached: the frozen stacks are read from disk one at a time in every step, or all kept in
    memory."""

    @property
    def time_steps_at_once(self) -> int | None:
        """How many time steps of a sample are on disk at the same time; None: all."""
        return None if self.store_all_time_steps else self.time_step_cache_size

    def problems(self) -> list[tuple[str, str]]:
        """A size of what is not limited."""
        if not self.store_all_time_steps:
            return []
        message = "has no effect with store_all_time_steps: true: leave it out or set that to false"
        return [(key, message) for key in self.changed(["time_step_cache_size"])]
