"""Formats `half` and `bfloat16`: matrices rounded to 16 bits."""

import torch
from torch import Tensor, nn

from stackwise.model.time import Modulation
from stackwise.precision.stored import Empty, StoredLinear, frozen


class RoundedLinear(StoredLinear):
    """A linear map whose matrix is rounded to `dtype`; where products have the same format, it is used as it is."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias)
        self.hold(self.weight.to(dtype))

    def take(self, weight: Tensor) -> None:
        """See `StoredLinear`."""
        self.hold(weight.to(self.weight.dtype))

    def stored(self) -> tuple[Tensor, ...]:
        """The matrix."""
        return (self.weight,)

    def hold(self, *stored: Tensor) -> None:
        """See `StoredLinear`."""
        (weight,) = stored
        self.weight = frozen(weight)

    def decode(self, empty: Empty, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """See `StoredLinear`."""
        (weight,) = stored
        if weight.dtype == dtype:
            return weight
        return empty((self.out_features, self.in_features), dtype, weight.device).copy_(weight)


class RoundedModulation(RoundedLinear, Modulation):
    """The same of a block's modulation by time."""

    def __init__(self, width: int, d_model: int, dtype: torch.dtype) -> None:
        Modulation.__init__(self, width, d_model)
        self.hold(self.weight.to(dtype))

    def plain(self) -> nn.Linear:
        """See `StoredLinear`."""
        with torch.device("meta"):
            return self._filled(Modulation(self.in_features, self.out_features // 6))
