"""A mixture of experts: many feed-forward networks, of which each token passes through a few."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stackwise.config.model import ModelParams
from stackwise.mlp.swiglu import SwiGLU


class MixtureOfExperts(nn.Module):
    """SwiGLU experts under a softmax router, with experts that every token passes besides.

    A token goes to the `top_k` experts of the highest probability, whose outputs are summed by their probabilities,
    renormalised (Jiang et al. 2024, Mixtral). With `top_k` 1 the probability stays as it is (Fedus et al. 2022,
    Switch): renormalised it would be 1, whatever the router says. Shared experts (Dai et al. 2024, DeepSeekMoE) are
    added. No token is dropped, and every sum has a fixed order.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        mlp = params.mlp
        self.top_k, self.balance_weight = mlp.top_k, mlp.balance_weight
        self.router = nn.Linear(params.d_model, mlp.n_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(params) for _ in range(mlp.n_experts))
        self.shared = nn.ModuleList(SwiGLU(params) for _ in range(mlp.n_shared))
        self.balance_loss: Tensor | None = None
        """After a pass in training mode with a router that trains: `balance_weight` times the load-balancing loss
        (scalar); otherwise None."""

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, d_model]` -> `[batch, seq, d_model]`."""
        tokens = x.flatten(0, -2)
        logits = self.router(tokens)
        probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        loads = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        trains = self.training and self.router.weight.requires_grad
        self.balance_loss = self.balance_weight * load_imbalance(probabilities, loads) if trains else None

        # Assignment i is of token i // top_k; sorted by expert they make one run for each.
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        runs = _Take.apply(tokens, order, inverse, self.top_k).split(loads.tolist())
        # Experts without a token run too, so that all have gradients, if zero, whatever the router does.
        outputs = torch.cat([expert(run) for expert, run in zip(self.experts, runs, strict=True)])
        outputs = _Take.apply(outputs, inverse, order, 1).unflatten(0, (-1, self.top_k))
        mixed = (weights.to(outputs.dtype)[:, None] @ outputs).view_as(x)
        for expert in self.shared:
            mixed = mixed + expert(x)
        return mixed


def load_imbalance(probabilities: Tensor, loads: Tensor) -> Tensor:
    """The load-balancing loss `n_experts * sum_i f_i P_i` (Fedus et al. 2022, Switch Transformer, equations 4-6).

    It is 1 when balanced, `n_experts` when all goes to one expert.

    Args:
        probabilities: of the router `[tokens, n_experts]`; P is their mean.
        loads: assignments to each expert `[n_experts]`; f is their share.

    Returns:
        A scalar of the dtype of `probabilities`.
    """
    shares = loads / loads.sum()
    return len(loads) * (shares.to(probabilities.dtype) * probabilities.mean(dim=0)).sum()


class _Take(torch.autograd.Function):
    """Rows in another order, each `copies` times.

    Written by hand because PyTorch's gradient of indexing adds rows up in no fixed order: here it is a gather too.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """`rows` `[n, dim]`, a permutation `order` of `n * copies` and its inverse -> `[n * copies, dim]`: row i is
        `rows[order[i] // copies]`."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of `rows`: the sum over the copies of each."""
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None
