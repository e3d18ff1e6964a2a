"""Weights laid out for few rows: a decoding step on a CPU reads every weight once and does little else."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stackwise.attention.dense import DenseAttention
from stackwise.mlp.swiglu import SwiGLU
from stackwise.model.rack import Rack


class TransposedLinear(nn.Module):
    """A linear map without bias whose matrix lies input by input: for a single row, whose product with it is then a sum
    of consecutive rows."""

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: `[out, in]`.
        """
        super().__init__()
        self._weight = weight.detach().T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return torch.matmul(x, self._weight)


class PackedLinear(nn.Module):
    """A linear map without bias whose matrix has the layout that oneDNN's kernels read, for a few rows.

    With PyTorch's own layout the kernels reorder the matrix in every call, which takes as long as the product.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        """
        Args:
            weight: `[out, in]` fp32 on the CPU.
            rows: for which the layout is chosen; it serves any number.
        """
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")


def packed(rack: Rack, rows: int) -> Rack:
    """The rack itself, its projections laid out anew where that is possible, those of the same input as one: the same
    sums in another order. It is for inference then, not to be saved.

    Args:
        rack: on a CPU in fp32; any other is left as it is.
        rows: positions of a decoding step: as many as texts.
    """
    weight = rack.head.norm.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return rack

    def laid_out(*weights: Tensor) -> nn.Module:
        whole = torch.cat(weights)
        return TransposedLinear(whole) if rows == 1 else PackedLinear(whole, rows)

    for module in list(rack.stacks.modules()):
        if isinstance(module, DenseAttention) and (own := _plain(module, ("q_proj", "k_proj", "v_proj"))):
            module.qkv_proj = laid_out(*own)
        if isinstance(module, SwiGLU) and (own := _plain(module, ("gate_proj", "up_proj"))):
            module.gate_up_proj = laid_out(*own)
        for name, part in list(module.named_children()):
            # Latent attention takes the matrix of kv_b_proj apart.
            if type(part) is nn.Linear and part.bias is None and name != "kv_b_proj":
                setattr(module, name, laid_out(part.weight))
    rack.head.packed = laid_out(rack.head.weight)
    return rack


def _plain(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The matrices of some projections, which are taken out of the module; none if they are not plain ones."""
    parts = [getattr(module, name) for name in names]
    if any(type(part) is not nn.Linear or part.bias is not None for part in parts):
        return []
    for name in names:
        delattr(module, name)
    return [part.weight for part in parts]
