"""From the residual stream to what lies in a store, and back: fp32, bf16, or a byte for each channel with scales.

In the narrow formats a channel is a code times a scale. int8: codes from -127 to 127, an fp16 scale for every 64
channels of a token, so that a channel with outliers spoils few others. fp8: e4m3 codes (Micikevicius et al. 2022), an
fp32 scale for every token; outliers cost the others nothing but their smallest values. Both are symmetric: the largest
magnitude of a group becomes the largest code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise.cache.sizes import FORMATS, StoreDtype
from stackwise.errors import UserError

_CHUNK_NUMBERS = 2**20
"""Numbers decoded at a time, few enough to stay in the processor's cache: twice as fast as a whole batch."""


@dataclass(frozen=True)
class _Codes:
    activations: str
    """Value of `trunk.activations`."""
    dtype: torch.dtype
    largest: float
    scale: torch.dtype


_CODES: dict[StoreDtype, _Codes] = {
    "int8": _Codes("int8", torch.int8, 127.0, torch.float16),
    "float8_e4m3fn": _Codes("fp8", torch.float8_e4m3fn, 448.0, torch.float32),
}


def encode(x: Tensor, dtype: StoreDtype) -> Tensor:
    """Activations `[..., d_model]` as a store of `dtype` keeps them: `[..., width]` of its element type, on the CPU.

    Args:
        x: on any device.
        dtype: a key of `stackwise.cache.sizes.FORMATS`.

    Raises:
        UserError: a number is not finite, or larger than the narrow format can tell.
    """
    if dtype == "float32":
        return x.float().cpu().contiguous()
    if dtype == "bfloat16":
        return x.bfloat16().cpu().contiguous().view(torch.uint16)
    codes, d_model = _CODES[dtype], x.shape[-1]
    x = x.float() if x.is_cuda else x.float().cpu()  # not every device knows 8-bit floats
    groups = _grouped(x, FORMATS[dtype].channels_per_scale(d_model))
    scales = (groups.abs().amax(dim=-1) / codes.largest).to(codes.scale)
    if not scales.isfinite().all():
        raise UserError(
            f"params.yaml: trunk.activations = {codes.activations}: what the frozen stacks make of the data is not "
            "finite or too large for it; look at their losses, or set it to bf16"
        )
    # The scales as they are stored; one that fp16 has rounded to zero stands for zeros.
    steps = scales.float().unsqueeze(-1)
    found = (groups / steps.where(steps > 0, 1.0)).clamp_(-codes.largest, codes.largest)
    if codes.dtype == torch.int8:
        found.round_()
    stored = found.to(codes.dtype).flatten(-2)[..., :d_model].view(torch.uint8)
    return torch.cat([stored, scales.view(torch.uint8)], dim=-1).cpu()


def decode(stored: Tensor, dtype: StoreDtype, d_model: int) -> Tensor:
    """What `encode` has stored -> `[..., d_model]`, fp32 from fp32, else bf16, on the CPU.

    Args:
        stored: `[..., width]`, contiguous.
        dtype: a key of `stackwise.cache.sizes.FORMATS`.
        d_model: channels.
    """
    if dtype == "float32":
        return stored
    if dtype == "bfloat16":
        return stored.view(torch.bfloat16)
    tokens = stored.flatten(0, -2)
    out = torch.empty((len(tokens), d_model), dtype=torch.bfloat16)
    size = max(1, _CHUNK_NUMBERS // d_model)
    for part, place in zip(tokens.split(size), out.split(size), strict=True):
        place.copy_(_decoded(part, dtype, d_model))
    return out.view(*stored.shape[:-1], d_model)


def _decoded(tokens: Tensor, dtype: StoreDtype, d_model: int) -> Tensor:
    """Codes and scales `[n, width]` -> `[n, d_model]` fp32."""
    codes, channels = tokens[:, :d_model].view(torch.int8), FORMATS[dtype].channels_per_scale(d_model)
    scales = tokens[:, d_model:].contiguous().view(_CODES[dtype].scale).float().unsqueeze(-1)
    if dtype == "float8_e4m3fn":
        # Shifted by 7 bits, sign apart, an e4m3 number is the fp16 number that is 2^8 times smaller (the biases of the
        # exponents are 7 and 15), subnormals included. Five times as fast as torch's conversion.
        halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
        values, scales = halves.float(), scales * 256.0
    else:
        values = codes.float()
    return _grouped(values, channels).mul_(scales).flatten(-2)[:, :d_model]


def _grouped(x: Tensor, channels: int) -> Tensor:
    """`[..., d_model]` -> `[..., groups, channels]`, zeros where the last group is short."""
    short = -x.shape[-1] % channels
    return (F.pad(x, (0, short)) if short else x).unflatten(-1, (-1, channels))
