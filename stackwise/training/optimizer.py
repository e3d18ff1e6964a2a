"""AdamW, its learning-rate schedules, and updates within the backward pass."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from stackwise.config.training import OptimizerParams


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], params: OptimizerParams, lr: float, lrs: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices only.

    Every group has, besides its learning rate `lr`, the peak of it, `peak_lr`.

    Args:
        parameters: all that will ever train, by name; in a step, one without a gradient is left as it is.
        params: its settings.
        lr: peak learning rate.
        lrs: those of parameters that have another, by name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        setting = lrs.get(name, lr), params.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault(setting, []).append(parameter)
    grouped = [
        {"params": members, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        for (peak, decay), members in groups.items()
    ]
    betas = params.beta1, params.beta2
    if params.state == "int8":
        from stackwise.training.quantized_adamw import QuantizedAdamW  # takes seconds, and few need it

        return QuantizedAdamW(grouped, betas=betas, eps=params.eps)
    return torch.optim.AdamW(grouped, betas=betas, eps=params.eps, fused=True)


@contextmanager
def updates_in_backward(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In here a backward pass updates each parameter as soon as its gradient is complete, and drops the gradient (Lv et
    al. 2023, LOMO, section 3.2).

    Whatever has been computed with a parameter has then passed on its gradient, so the updates are those that
    `optimizer.step()` would do after the pass.
    """

    def update(parameter: nn.Parameter) -> None:
        optimizer.step()  # of this one: no other has a gradient
        parameter.grad = None

    with ExitStack() as hooks:
        for parameter in parameters:
            hooks.callback(parameter.register_post_accumulate_grad_hook(update).remove)
        yield


def learning_rate_share(params: OptimizerParams, step: int, steps: int) -> float:
    """Learning rate of `step` (from 0) as a share of the peak: warm-up, then the schedule down to `final_lr`."""
    warmup = round(params.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    final = params.final_lr
    done = (step - warmup) / max(1, steps - warmup)
    match params.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - final) * done
        case "cosine":
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":  # warm-up, stable, decay (Hu et al. 2024, MiniCPM)
            left = (steps - step) / max(1.0, params.decay * steps)
            return final + (1.0 - final) * min(1.0, left)
