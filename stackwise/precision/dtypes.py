"""Names of numeric formats, and the autocast of matrix products."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch dtype of each name that `params.yaml` uses."""


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """Matrix products in `dtype` (a key of `DTYPES`), everything that must be exact in fp32."""
    return nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype])
