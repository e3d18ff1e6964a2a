"""AdamW and its learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from stackwise.config.training import OptimizerParams


def build_optimizer(parameters: Iterable[nn.Parameter], params: OptimizerParams, lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; weight decay on matrices only."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=lr, betas=(params.beta1, params.beta2), eps=params.eps, fused=True
    )


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
