"""RMSNorm (Zhang & Sennrich 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight`, in fp32 at least; the result has the dtype of `x`.

    PyTorch's kernel where that is fused. Elsewhere it is a chain of operations, which takes twice the time and keeps a
    few tensors of the size of `x` for the gradient; here it keeps `x`.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` -> `[..., dim]`."""
        if x.is_cuda and x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        if not torch.is_grad_enabled():  # the same numbers, without what the gradient takes
            return _normalized(x, self.weight, self.eps)[0]
        return _Normalize.apply(x, self.weight, self.eps)


def _normalized(x: Tensor, weight: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """`x` `[..., dim]` normalised, and the factors `[..., 1]` that it took."""
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    scale = norm.square_().div_(x.shape[-1]).add_(eps or 0.0).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`[..., dim]` and `[dim]` -> `[..., dim]`."""
        normalized, scale = _normalized(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With n = x * scale: `scale * (grad * weight - n * mean(grad * weight * n))`, and the sum of `grad * n`."""
        x, weight, scale = ctx.saved_tensors
        n = x * scale
        products = grad * n
        grad_weight = products.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = products.mul_(weight).mean(dim=-1, keepdim=True)
        grad_x = n.mul_(mean.neg_()).addcmul_(grad.to(n.dtype), weight.to(n.dtype)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None
