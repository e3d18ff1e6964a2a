"""Linear maps with a frozen matrix that is stored in another format than that which computes."""

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

Empty = Callable[[tuple[int, int], torch.dtype, torch.device], Tensor]
"""Makes a matrix of undefined numbers."""
_CHUNK = 2**16
"""Numbers that are decoded at a time; whole groups of scales of every format."""


class StoredLinear(nn.Linear):
    """A linear map whose matrix never trains and is decoded for each product, forwards and backwards.

    The product has the format of autocast, or that of the input where there is none, as that of an `nn.Linear` has. It
    is the same while training and after, and gradients flow to the input and to the bias. Nothing decoded is kept for
    the backward pass: a graph holds the stored tensors, which exist anyway. Moved to another device it keeps its
    format; `half()` and the like change nothing.
    """

    def take(self, weight: Tensor) -> None:
        """Store a matrix `[out_features, in_features]`, rounded to the format."""
        raise NotImplementedError

    def stored(self) -> tuple[Tensor, ...]:
        """All tensors that make up the matrix: codes, scales, tables."""
        raise NotImplementedError

    def hold(self, *stored: Tensor) -> None:
        """Have these for the matrix, as they are: what `stored` of such a module returned."""
        raise NotImplementedError

    def decode(self, empty: Empty, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """What `stored` means, `[out_features, in_features]`, rounded once to `dtype`: in memory that `empty` gives, or
        a stored tensor itself. Reads no tensor of the module: whoever streams weights may have put others there by
        then."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix `[out_features, in_features]` that the products use, in `dtype`."""
        return self.decode(_new, dtype, *self.stored())

    def plain(self) -> nn.Linear:
        """The same map as an ordinary module in fp32."""
        return self._filled(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))

    @_disable_dynamo  # a compiled graph would keep what is decoded; `torch.compiler.disable` takes seconds to import
    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        y: Tensor = _Product.apply(x.to(_product_dtype(x)), self.decode, *self.stored())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _filled(self, plain: nn.Linear) -> nn.Linear:
        plain.weight = nn.Parameter(self.matrix(torch.float32))
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().float())
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(self.weight.detach()).device
        if device != self.weight.device:
            self.hold(*(tensor.detach().to(device) for tensor in self.stored()))
            if self.bias is not None:
                self.bias = nn.Parameter(self.bias.detach().to(device), self.bias.requires_grad)
        return self


def frozen(codes: Tensor) -> nn.Parameter:
    """A weight that never trains."""
    return nn.Parameter(codes.detach(), requires_grad=False)


def decode_rows(decode: Callable[..., Tensor], matrix: Tensor, *by_row: Tensor) -> Tensor:
    """Fill a matrix some rows at a time.

    Args:
        decode: makes rows `[n, columns]`, of any dtype, from the same rows of `by_row`.
        matrix: is filled.
        by_row: `[rows, ...]` each.
    """
    rows, columns = matrix.shape
    size = max(1, numbers_at_a_time(matrix.device) // columns)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        matrix[part] = decode(*(tensor[part] for tensor in by_row))
    return matrix


def numbers_at_a_time(device: torch.device) -> int:
    """How much is decoded at a time: on a CPU little, because the operations on the way take several times that, on
    others, where each operation takes its time to begin, all."""
    return _CHUNK if device.type == "cpu" else 2**62


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Callable[..., Tensor], *stored: Tensor) -> Tensor:
        """`x` `[..., d_in]` times the decoded `[d_out, d_in]` -> `[..., d_out]`."""
        ctx.decode = decode
        ctx.save_for_backward(*stored)
        return F.linear(x, decode(_scratch, x.dtype, *stored))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of `x`."""
        stored = ctx.saved_tensors
        return grad @ ctx.decode(_scratch, grad.dtype, *stored), None, *(None for _ in stored)


class _Buffer(threading.local):
    """Of one thread."""

    bytes: Tensor = torch.empty(0, dtype=torch.uint8, device="cpu")


_buffer = _Buffer()


def _new(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix that is good until the next one is asked for. On a CPU it is always the same memory: matrices that come
    and go among activations leave holes in the heap, in time for more than the stack takes."""
    if device.type != "cpu":
        return _new(shape, dtype, device)
    size = shape[0] * shape[1] * dtype.itemsize
    if len(_buffer.bytes) < size:
        _buffer.bytes = torch.empty(size, dtype=torch.uint8, device=device)
    return _buffer.bytes[:size].view(dtype).view(shape)
