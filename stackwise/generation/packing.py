"""Weights laid out for few rows: a decoding step on a CPU reads every weight once and does little else."""

import torch
from torch import Tensor, nn

from stackwise.model.rack import Rack

_ROWS = 16
"""Rows for which the layout is chosen; it serves any number."""


class PackedLinear(nn.Module):
    """A linear map without bias whose matrix has the layout that oneDNN's kernels read, instead of PyTorch's.

    The same sums in another order. With PyTorch's layout the kernels reorder the matrix in every call, which takes as
    long as the product itself if there are few rows.
    """

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: `[out, in]` fp32 on the CPU.
        """
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")


def packed(rack: Rack) -> Rack:
    """The rack itself, its projections laid out anew where that is possible: for inference, not to be saved."""
    weight = rack.head.norm.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return rack
    for module in list(rack.stacks.modules()):
        for name, part in list(module.named_children()):
            # Latent attention takes the matrix of kv_b_proj apart.
            if type(part) is nn.Linear and part.bias is None and name != "kv_b_proj":
                setattr(module, name, PackedLinear(part.weight))
    return rack
