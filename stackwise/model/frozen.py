"""Random numbers that are part of a model but not of its weights: drawn from a seed that is stored in their place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Draw = Callable[[torch.Generator], Tensor]


class FrozenRandom(nn.Module):
    """A tensor that never trains and is not stored: `draw` makes it again from the seed, on any device the same.

    The state dict holds the seed (int64, scalar); loading one draws the tensor. So frozen features cost no disk, no
    gradient and no optimizer state, and a copied block has the features of its original.
    """

    seed: Tensor
    value: Tensor

    def __init__(self, shape: Sequence[int], draw: Draw) -> None:
        """Its value is undefined until it is seeded or loaded.

        Args:
            shape: of the tensor.
            draw: makes the tensor, in fp32 on the CPU; a pure function of the generator that it is given.
        """
        super().__init__()
        self._draw = draw
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("value", torch.empty(*shape), persistent=False)

    def reseed(self, seed: int) -> None:
        """Draw the tensor anew from `seed`, in place of the old one."""
        self.seed.fill_(seed)
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            value = self._draw(torch.Generator().manual_seed(seed))
        assert value.shape == self.value.shape, (value.shape, self.value.shape)
        self.value = value.to(self.seed.device, self.value.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.seed.device.type != "meta":
            self.reseed(int(self.seed))


class RedrawnFeatures(FrozenRandom):
    """A frozen random tensor that is drawn anew while a model trains, every `every` steps (None: never).

    Which draw a step sees is a function of its number and of the seed at the start of training alone, so that a resumed
    run sees the same.
    """

    def __init__(self, shape: Sequence[int], draw: Draw, every: int | None) -> None:
        super().__init__(shape, draw)
        self._every = every
        self._first: int | None = None

    def begin_step(self, step: int) -> None:
        """Draw anew if a step (from 0) of another draw begins."""
        if self._every is None:
            return
        if self._first is None:
            self._first = int(self.seed)
        seed = self._first + step // self._every
        if seed != int(self.seed):
            self.reseed(seed)


class FrozenLinear(FrozenRandom):
    """A linear map without bias whose weight `[d_out, d_in]` is normal with standard deviation `d_in ** -0.5`."""

    def __init__(self, d_in: int, d_out: int) -> None:
        shape = (d_out, d_in)
        super().__init__(shape, lambda generator: torch.randn(shape, generator=generator) * d_in**-0.5)

    @property
    def weight(self) -> Tensor:
        """`[d_out, d_in]`."""
        return self.value

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_in]` -> `[..., d_out]`."""
        return nn.functional.linear(x, self.value)
