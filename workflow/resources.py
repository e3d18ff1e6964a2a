"""Estimates of what stages need, for Snakemake's scheduler. They have no influence on results."""

import os
from collections.abc import Iterable

from stackwise.config.params import Params

PROCESS_MB = 900
"""A Python process with torch loaded."""


class Estimate:
    """Memory of the pipeline's kinds of work, from the parameters alone."""

    def __init__(self, params: Params) -> None:
        self._params = params
        vocab = params.tokenizer.vocab_size or 50_000  # known only after tokenizing
        self._ends = 2 * vocab * params.model.d_model

    def gpu(self) -> int:
        """GPUs that a computing stage takes: one where CUDA is asked for, or found with `auto`."""
        device = self._params.compute.device
        return int(device == "cuda" or (device == "auto" and os.path.exists("/proc/driver/nvidia/version")))

    def training_mb(self, stacks: Iterable[int], batch_size: int) -> int:
        """Weights, gradients and AdamW's two moments in fp32, and the activations that backward needs."""
        stacks = list(stacks)
        micro_batch = batch_size // self._params.optimizer.accumulate
        activations = micro_batch * self._params.seq_len * sum(map(self._width, stacks)) * 4
        return PROCESS_MB + round((16 * (sum(map(self._weights, stacks)) + self._ends) + activations) / 1e6)

    def reading_mb(self, stacks: Iterable[int]) -> int:
        """Weights in fp32, read once and held once."""
        return PROCESS_MB + round(8 * (sum(map(self._weights, stacks)) + self._ends) / 1e6)

    def _weights(self, k: int) -> int:
        """Weights of stack `k`; those of latent attention count as those of dense attention, which has more."""
        model, blocks = self._params.stack_model(k), self._params.stack_params(k).blocks
        heads, mlp = model.attention.n_heads, model.mlp
        width = heads * (model.attention.head_dim or model.d_model // heads)
        attention = 2 * model.d_model * width * (1 + (model.attention.n_kv_heads or heads) / heads)
        networks = mlp.n_experts + mlp.n_shared if mlp.type == "moe" else 1
        return round(blocks * (attention + 3 * model.d_model * mlp.hidden * networks))

    def _width(self, k: int) -> int:
        """Numbers per token that backward needs of stack `k`."""
        model, blocks = self._params.stack_model(k), self._params.stack_params(k).blocks
        networks = model.mlp.top_k + model.mlp.n_shared if model.mlp.type == "moe" else 1
        return blocks * (8 * model.d_model + 3 * model.mlp.hidden * networks)
