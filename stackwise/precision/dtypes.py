"""Names of numeric formats, and the autocast of matrix products."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch dtype of each name that `params.yaml` uses."""


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in `dtype` (a key of `DTYPES`), everything that must be exact in fp32; whatever surrounds it."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32")
