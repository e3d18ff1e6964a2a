"""Format `nvfp4`: numbers of 4 bits, a scale for each 16 of them, and one for the matrix.

They are decoded for each product on every device: also on one that could multiply them as they are, the activations,
which it would have to round to 4 bits too, are not.
"""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.precision.fp8 import E4M3, E4M3_MAX, e4m3_values
from stackwise.precision.sizes import NVFP4_GROUP
from stackwise.precision.stored import Empty, StoredLinear, decode_rows, frozen

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What e2m1 numbers (sign, 2 bits of exponent, 1 of significand; OCP Microscaling Formats, version 1.0) can be. The
code of `_MAGNITUDES[i]` is i, with 8 added for a minus."""
_LEAST_SCALE = 2.0**-9
"""The least e4m3 number above 0: smaller scales would lose their group, or divide by 0."""


class Nvfp4Linear(StoredLinear):
    """A linear map with a matrix of e2m1 numbers, of which each 16 neighbours in a row share an e4m3 scale, and all an
    fp32 scale that lets these fill their range (NVIDIA 2025, Pretraining Large Language Models with NVFP4, section 2).

    The last group of a row may be padded with zeros.
    """

    group_scales: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("group_scales", None)
        self.register_buffer("scale", None)
        groups = -(-in_features // NVFP4_GROUP)
        codes, scales = (torch.empty(out_features, groups * n, dtype=torch.uint8) for n in (NVFP4_GROUP // 2, 1))
        self.hold(codes, scales, torch.empty(()))

    def take(self, weight: Tensor) -> None:
        """See `StoredLinear`."""
        rows, columns = weight.shape
        groups = F.pad(weight.detach().float(), (0, -columns % NVFP4_GROUP)).view(rows, -1, NVFP4_GROUP)
        largest = groups.abs().amax(dim=2)
        scale = largest.amax() / (E4M3_MAX * _MAGNITUDES[-1])
        scale = torch.where(scale > 0, scale, 1.0)
        scales = (largest / (_MAGNITUDES[-1] * scale)).clamp(_LEAST_SCALE, E4M3_MAX).to(E4M3)
        codes = e2m1_codes(groups / (scales.float() * scale)[..., None]).view(rows, -1)
        self.hold(codes[:, ::2] << 4 | codes[:, 1::2], scales.view(torch.uint8), scale)

    def stored(self) -> tuple[Tensor, ...]:
        """Codes, two in a byte, `[out_features, 8 * groups]`, scales `[out_features, groups]`, scale `[]`."""
        return self.weight, self.group_scales, self.scale

    def hold(self, *stored: Tensor) -> None:
        """See `StoredLinear`."""
        codes, self.group_scales, self.scale = stored
        self.weight = frozen(codes)

    def decode(self, empty: Empty, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """See `StoredLinear`."""
        codes, group_scales, scale = stored
        rows, groups = group_scales.shape
        scales = e4m3_values(torch.float32, codes.device) * scale
        pairs = _pairs(dtype, codes.device)

        def decode(codes: Tensor, group_scales: Tensor) -> Tensor:
            values = pairs.index_select(0, codes.flatten().int()).view(dtype).view(-1, NVFP4_GROUP)
            return values.mul_(scales.index_select(0, group_scales.flatten().int())[:, None]).view(len(codes), -1)

        matrix = empty((rows, groups * NVFP4_GROUP), dtype, codes.device)
        return decode_rows(decode, matrix, codes, group_scales)[:, : self.in_features]


def e2m1_codes(x: Tensor) -> Tensor:
    """The codes of the nearest e2m1 numbers, uint8; in the middle between two, of the one whose code is even."""
    middles = [(low + high) / 2 for low, high in pairwise(_MAGNITUDES)]
    bounds = torch.tensor(middles, dtype=x.dtype, device=x.device)
    # A bound belongs to the code below it: from an odd one it has to go up.
    bounds[1::2] = bounds[1::2].nextafter(bounds.new_zeros(()))
    return torch.bucketize(x.abs(), bounds, out_int32=True).to(torch.uint8) | x.signbit().to(torch.uint8) << 3


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each byte, as one integer of their width: one look-up serves both. `[256]`."""
    values = torch.tensor(_MAGNITUDES, dtype=dtype, device="cpu")
    values = torch.cat((values, -values))
    pairs = torch.cartesian_prod(values, values)
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten().to(device)
