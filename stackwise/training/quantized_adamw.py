"""AdamW with moments of 8 bits, by bitsandbytes. Its import takes seconds: import this module where it is used.

Its kernels are used, its optimizers are not: these keep the code tables in the state of every parameter, wait for the
device after each, and on a CPU hold five copies of a whole matrix in fp32 while they update it.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

# Says at import that an optional package is missing, which would fetch code from the network.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from bitsandbytes.functional import create_dynamic_map, optimizer_update_8bit_blockwise, optimizer_update_32bit

BLOCK = 256
"""Values that share a scale."""
LEAST = 4096
"""Elements from which on a parameter's moments have 8 bits: fewer are not worth the error."""
_SLICE = 2**20
"""Elements that are updated at a time: on a CPU their moments are in fp32 meanwhile."""


class QuantizedAdamW(torch.optim.Optimizer):
    """AdamW whose moments are codes of 8 bits, each the nearest in a table of 256 values whose spacing grows with their
    size, with a scale for every `BLOCK` (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section
    2). Moments of parameters of less than `LEAST` elements are fp32."""

    def __init__(self, params: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        """
        Args:
            params: groups, each with `params`, `lr` and `weight_decay`; fp32, all elements side by side.
            betas: decay of the first and of the second moment.
            eps: of the denominator.
        """
        super().__init__(params, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` has no use here."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_new_state(parameter))
        # On the CPU, because the kernels take a number; a checkpoint has put it where the parameter is.
        state["step"] = state["step"].cpu() + 1
        step, lr, decay, eps = int(state["step"]), group["lr"], group["weight_decay"], group["eps"]
        beta1, beta2 = group["betas"]
        weights, grad = parameter.detach().view(-1), cast(Tensor, parameter.grad).reshape(-1)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if first.dtype == torch.float32:
            optimizer_update_32bit(
                "adam", grad, weights, first, beta1, eps, step, lr, second, beta2, weight_decay=decay
            )
            return
        signed, unsigned = _codes(weights.device, True), _codes(weights.device, False)
        for start in range(0, len(weights), _SLICE):
            part = slice(start, start + _SLICE)
            scales = slice(start // BLOCK, (start + _SLICE) // BLOCK)
            optimizer_update_8bit_blockwise(
                "adam",
                grad[part],
                weights[part],
                first[part],
                second[part],
                beta1,
                beta2,
                0.0,  # of another optimizer, like the next
                0.0,
                eps,
                step,
                lr,
                signed,
                unsigned,
                state["exp_avg_scale"][scales],
                state["exp_avg_sq_scale"][scales],
                decay,
            )


def _new_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Moments of zero, without a shape: whatever the codes, the scales are zero."""
    n, device = parameter.numel(), parameter.device
    dtype = torch.float32 if n < LEAST else torch.uint8
    state = {name: torch.zeros(n, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq")}
    if dtype == torch.uint8:
        state |= {f"{name}_scale": torch.zeros(-(-n // BLOCK), device=device) for name in state}
    return state | {"step": torch.zeros((), dtype=torch.int64)}


@cache
def _codes(device: torch.device, signed: bool) -> Tensor:
    """What the codes mean `[256]` fp32, from -1 or 0 to 1."""
    return create_dynamic_map(signed=signed).to(device)
