"""The trunk in a training step where nothing is cached: frozen stacks that pass through memory one at a time."""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from stackwise.cache.narrow import decode, encode
from stackwise.cache.sizes import DTYPES
from stackwise.model.context import Context
from stackwise.model.embeddings import Embeddings
from stackwise.model.stack import Stack
from stackwise.precision.dtypes import autocast
from stackwise.precision.trunk import TrunkStack


class StreamedTrunk:
    """Frozen stacks below a window, computed in every step.

    Each stack is read from its file, used and released before the next (Pudipeddi et al. 2020, L2L), while the kernel
    reads ahead; or all stay in memory. Either way its output is rounded as the activation cache rounds it, so that a
    window sees what it would see in a cache of the same format. On CPUs that is the same bits, whatever the batch: a
    sample's products do not depend on how many others there are, unless they are very few (an fp32 mixture of experts
    of which some get under about 16 tokens, short samples one by one), which changes some last bits. CUDA chooses among
    its kernels by size: there the results agree to rounding.
    """

    def __init__(
        self, stacks: Sequence[TrunkStack], *, compute: str, activations: str, device: torch.device, resident: bool
    ) -> None:
        """
        Args:
            stacks: the trunk from the bottom of the rack, bottom to top; at least one.
            compute: format of the matrix products (a key of `stackwise.precision.dtypes.DTYPES`).
            activations: format that each stack's output is rounded to (a key of `stackwise.cache.sizes.DTYPES`).
            device: computes.
            resident: keep everything in memory once it has been read.
        """
        self._load_embeddings: Callable[[], Embeddings] = partial(stacks[0].load_embeddings, device)
        self._load_stacks: list[Callable[[], Stack]] = [partial(s.load_stack, compute, device) for s in stacks]
        if resident:
            self._load_embeddings = cache(self._load_embeddings)
            self._load_stacks = [cache(load) for load in self._load_stacks]
        self._directories = [stack.artifact.path for stack in stacks]
        self._resident = resident
        self._compute, self._store_dtype, self._device = compute, DTYPES[activations], device

    @torch.no_grad()
    def __call__(self, inputs: Tensor, context: Context) -> Tensor:
        """The residual stream above the trunk, without gradients.

        Args:
            inputs: token ids `[batch, seq]` int64, or the residual stream that enters the lowest stack
                `[batch, seq, d_model]`.
            context: what all blocks share.

        Returns:
            `[batch, seq, d_model]` fp32.

        Raises:
            UserError: the machine cannot compute with the format of a stack, or the format of the activations cannot
                hold what it puts out.
        """
        with autocast(self._device, self._compute):
            x = inputs.float() if inputs.is_floating_point() else self._load_embeddings()(inputs).float()
            for i, load in enumerate(self._load_stacks, 1):
                if not self._resident:
                    _announce(self._directories[i % len(self._directories)])  # after the last comes the next step
                x = self._rounded(load()(x, context))
        return x

    def _rounded(self, x: Tensor) -> Tensor:
        """As `x` comes back from a store `[batch, seq, d_model]` fp32."""
        if self._store_dtype == "float32":
            return x.float()
        if self._store_dtype == "bfloat16":
            return x.bfloat16().float()
        stored = encode(x, self._store_dtype)
        return decode(stored, self._store_dtype, x.shape[-1]).to(x.device).float()


def _announce(artifact: Path) -> None:
    """Let the kernel start to read an artifact's weights into memory, without waiting for them."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for path in artifact.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
