"""Cross-entropy of chosen rows, in chunks, so that no [batch, seq, vocab] tensor ever exists."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.model.embeddings import Embeddings
from stackwise.model.rack import Head
from stackwise.objectives.targets import Targets

_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26, "mps": 2**24}
"""Logits that exist at once (rows * vocab), by device type."""


def target_loss(head: Head, x: Tensor, targets: Targets) -> Tensor:
    """The loss of a batch: weighted cross-entropy at the target rows, summed, divided by batch * seq.

    The rows are gathered before the head, so norm and projection see only what counts.

    Args:
        head: norm and projection.
        x: the residual stream `[batch, seq, d_model]`.
        targets: rows, tokens and weights.

    Returns:
        A scalar (fp32).
    """
    rows = x.reshape(-1, x.shape[-1]).index_select(0, targets.rows)
    total = weighted_cross_entropy(head.features(rows), head.weight, targets.tokens, targets.weights)
    return total / targets.batch_tokens


def embedding_loss(embeddings: Embeddings, x: Tensor, targets: Targets) -> Tensor:
    """The denoising term in embedding space: features come near to the embeddings of the tokens that they stand for.

    `weight * sum_i weights_i |n(x_i) - n(e_i)|^2 / d_model / (batch * seq)` over the target rows, with n the RMS norm
    without a scale and e the input embedding, which does not learn from it: the x_0 regression of Li et al. (2022,
    Diffusion-LM), weighted as the cross-entropy is.

    Args:
        embeddings: of the inputs.
        x: the residual stream below the head `[batch, seq, d_model]`.
        targets: rows, tokens and weights.

    Returns:
        A scalar (fp32).
    """
    rows = x.reshape(-1, x.shape[-1]).index_select(0, targets.rows)
    with torch.no_grad():
        truth = embeddings(targets.tokens[None])[0]
    found, wanted = (F.rms_norm(part.float(), part.shape[-1:], eps=1e-12) for part in (rows, truth))
    distances = (found - wanted).square().mean(dim=-1)
    return targets.embedding_weight * (targets.weights * distances).sum() / targets.batch_tokens


def consistency_loss(x: Tensor, known: Tensor) -> Tensor:
    """How far a new stack's output is from what the stacks above it have learned to read.

    `|x - known|^2 / |known|^2` over the whole batch: 0 where they agree, 1 where `x` is zero.

    Args:
        x: the output `[batch, seq, d_model]`.
        known: what was there when those stacks learned `[batch, seq, d_model]`; it does not learn.

    Returns:
        A scalar (fp32).
    """
    known = known.detach().float()
    return (x.float() - known).square().sum() / known.square().sum()


def weighted_cross_entropy(x: Tensor, weight: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """`sum_i weights_i * -log softmax(x_i weight^T)[tokens_i]`.

    The gradients are computed with the loss, a chunk of rows at a time (as in the fused linear cross-entropy of Hsu et
    al. 2024, Liger Kernel), so that memory grows with chunk * vocab, not with rows * vocab.

    Args:
        x: normalised rows `[n, d_model]`.
        weight: the projection `[vocab, d_model]`.
        tokens: `[n]` int64.
        weights: `[n]` fp32.

    Returns:
        A scalar (fp32). Gradients reach `x` and `weight` where they are wanted; differentiable once.
    """
    return _WeightedCrossEntropy.apply(x, weight, tokens, weights)


def token_log_probabilities(x: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What evaluation needs of each row: the log-probability of its token and whether that was the likeliest.

    Args:
        x: normalised rows `[n, d_model]`.
        weight: the projection `[vocab, d_model]`.
        tokens: `[n]` int64.

    Returns:
        log-probabilities in nats `[n]` fp32, hits `[n]` bool.
    """
    log_probabilities, hits = (
        torch.empty(len(x), device=x.device),
        torch.empty(len(x), dtype=torch.bool, device=x.device),
    )
    for rows in _chunks(len(x), len(weight), x.device):
        logits = F.linear(x[rows], weight).float()
        log_probabilities[rows] = logits.gather(1, tokens[rows, None])[:, 0] - logits.logsumexp(1)
        hits[rows] = logits.argmax(1) == tokens[rows]
    return log_probabilities, hits


def _chunks(n: int, vocab: int, device: torch.device) -> list[slice]:
    size = max(64, _CHUNK_ELEMENTS[device.type] // vocab)
    return [slice(i, i + size) for i in range(0, n, size)]


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty(x.shape, dtype=torch.float32, device=x.device) if wants_x else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wants_weight else None
        total = torch.zeros((), device=x.device)
        device = x.device.type
        if torch.is_autocast_enabled(device):  # once, not once a chunk
            weight, x = weight.to(torch.get_autocast_dtype(device)), x.to(torch.get_autocast_dtype(device))
        for rows in _chunks(len(x), len(weight), x.device):
            logits = F.linear(x[rows], weight).float()
            normalizer = logits.logsumexp(1, keepdim=True)
            chosen = tokens[rows, None]
            total += (weights[rows] * (normalizer - logits.gather(1, chosen))[:, 0]).sum()
            if not (wants_x or wants_weight):
                continue
            # softmax - one-hot, weighted; the division by batch * seq comes later in fp32, out of fp16's underflow
            slope = logits.sub_(normalizer).exp_()
            slope.scatter_(1, chosen, slope.gather(1, chosen) - 1.0)
            slope = slope.mul_(weights[rows, None]).to(weight.dtype)
            if grad_x is not None:
                grad_x[rows] = (slope @ weight).float()
            if grad_weight is not None:
                grad_weight += slope.T @ x[rows]
        ctx.gradients = grad_x, grad_weight
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.gradients
        ctx.gradients = None
        return (
            None if grad_x is None else grad_x.mul_(grad),
            None if grad_weight is None else grad_weight.mul_(grad),
            None,
            None,
        )
