"""Format `fp8`: numbers of 8 bits, and a scale for each row."""

from functools import cache

import torch
from torch import Tensor

from stackwise.precision.stored import Empty, StoredLinear, decode_rows, frozen

E4M3 = torch.float8_e4m3fn
"""Sign, 4 bits of exponent, 3 of significand (Micikevicius et al. 2022, FP8 Formats for Deep Learning)."""
E4M3_MAX = 448.0


class Fp8Linear(StoredLinear):
    """A linear map with a matrix of e4m3 numbers and an fp32 scale for each row, by which its largest becomes 448.

    The numbers are kept as bytes: PEFT makes adapters in the format of a floating-point weight, which must not be this.
    """

    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("scale", None)
        self.hold(torch.empty(out_features, in_features, dtype=torch.uint8), torch.empty(out_features))

    def take(self, weight: Tensor) -> None:
        """See `StoredLinear`."""
        weight = weight.detach().float()
        scale = weight.abs().amax(dim=1) / E4M3_MAX
        scale = torch.where(scale > 0, scale, 1.0)
        scaled = (weight / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX)
        self.hold(scaled.to(E4M3).view(torch.uint8), scale)

    def stored(self) -> tuple[Tensor, ...]:
        """Codes `[out_features, in_features]`, scales `[out_features]`."""
        return self.weight, self.scale

    def hold(self, *stored: Tensor) -> None:
        """See `StoredLinear`."""
        codes, self.scale = stored
        self.weight = frozen(codes)

    def decode(self, empty: Empty, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """See `StoredLinear`."""
        codes, scale = stored
        values = e4m3_values(dtype, codes.device)

        def decode(codes: Tensor, scale: Tensor) -> Tensor:
            # On a CPU a look-up is four times as fast as a cast.
            return values.index_select(0, codes.flatten().int()).view_as(codes).mul_(scale[:, None])

        return decode_rows(decode, empty((self.out_features, self.in_features), dtype, codes.device), codes, scale)


@cache
def e4m3_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of the 256 codes `[256]`, all exact."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(E4M3).to(dtype).to(device)
