"""What a training step really does: its floating-point operations, and the memory of the tensors that it holds."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **named: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_ON_CPU: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""The fused attention of CPUs, which PyTorch's own counter does not know."""


class Meter(TorchDispatchMode):
    """Counts what happens in its block, in this thread and in the backward passes that begin there.

    Memory is that of all storages which an operation has read or made, from then until they are freed: weights and
    batches with the first operation on them, activations, gradients, optimizer states and temporary tensors. What a
    kernel takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Floating-point operations of all matrix products and attention."""
        self.peak = 0
        """The most bytes at once."""
        self._live = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and take note of it."""
        kwargs = kwargs or {}
        if func not in flop_registry:  # without gradients an operation such as `linear` comes here whole
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _ON_CPU:
            self.flops += _ON_CPU[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=result))
        for part in tree_leaves((args, kwargs, result)):
            if isinstance(part, Tensor):
                self._see(part)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = size
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._live -= self._known.pop(key)
