"""Estimates of what stages need, for Snakemake's scheduler. They have no influence on results."""

import os

from stackwise.config.params import Params

PROCESS_MB = 900
"""A Python process with torch loaded."""


class Estimate:
    """Memory of the pipeline's kinds of work, from the parameters alone."""

    def __init__(self, params: Params) -> None:
        model, self._params = params.model, params
        kv_heads = model.attention.n_kv_heads or model.attention.n_heads
        attention = 2 * model.d_model**2 * (1 + kv_heads / model.attention.n_heads)
        self._block = attention + 3 * model.d_model * model.mlp.hidden
        vocab = params.tokenizer.vocab_size or 50_000  # known only after tokenizing
        self._ends = 2 * vocab * model.d_model
        self._width = 8 * model.d_model + 3 * model.mlp.hidden

    def gpu(self) -> int:
        """GPUs that a computing stage takes: one where CUDA is asked for, or found with `auto`."""
        device = self._params.compute.device
        return int(device == "cuda" or (device == "auto" and os.path.exists("/proc/driver/nvidia/version")))

    def blocks(self, stacks: range) -> int:
        """Blocks of some stacks together."""
        return sum(self._params.stack_params(k).blocks for k in stacks)

    def training_mb(self, blocks: int, batch_size: int) -> int:
        """Weights, gradients and AdamW's two moments in fp32, and the activations that backward needs."""
        micro_batch = batch_size // self._params.optimizer.accumulate
        activations = micro_batch * self._params.seq_len * self._width * blocks * 4
        return PROCESS_MB + round((16 * (self._block * blocks + self._ends) + activations) / 1e6)

    def reading_mb(self, blocks: int) -> int:
        """Weights in fp32, read once and held once."""
        return PROCESS_MB + round(8 * (self._block * blocks + self._ends) / 1e6)
