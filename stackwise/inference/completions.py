"""The likelihood of held-out completions given their prompts."""

import math

import numpy as np
import torch

from stackwise.inference.evaluation import Evaluator, Metrics, in_units
from stackwise.inference.intervals import ratio
from stackwise.model.rack import Rack
from stackwise.objectives.held_out import CompletionBoundObjective, spread
from stackwise.objectives.loss import token_log_probabilities
from stackwise.objectives.targets import NO_TARGET, CompletionObjective, Objective
from stackwise.precision.dtypes import autocast


def completion_metrics(rack: Rack, evaluator: Evaluator, *, causal: bool) -> Metrics:
    """Negative log-likelihood of held-out completions given their prompts, over their tokens and ends of text.

    Args:
        rack: in evaluation mode, on the evaluator's device.
        evaluator: of packed completions, with how many samples and, for the bound, how many draws of each.
        causal: next tokens; if not, the bound of `CompletionBoundObjective`.

    Returns:
        `nats_per_token` and `bits_per_byte` (bytes of the completions); with `causal` also `accuracy`, the share of
        tokens that are the likeliest; all with intervals over the samples (`ratio`). `unigram`: the same of the
        baseline that knows only how often each token occurs in the completions of training (add-one smoothing).
    """
    tokens, params, device = evaluator.tokens, evaluator.params, evaluator.device
    own = tokens.validation
    chosen, draws = spread(len(own), params.samples), 1 if causal else params.draws
    objective: Objective = CompletionObjective(own)
    if not causal:
        objective = CompletionBoundObjective(own, evaluator.seed, tokens.vocabulary.mask_id)
    smoothed = tokens.counts + 1.0
    unigram = -np.log(smoothed / smoothed.sum())
    nats, hits, counts, baseline = np.zeros((4, len(chosen)))
    pairs = np.arange(len(chosen) * draws)
    for part in np.array_split(pairs, math.ceil(len(pairs) / params.batch_size)):
        places = part // draws
        samples = chosen[places]
        task = objective(own.samples(samples), samples, part)
        targets = task.targets.to(device)
        with torch.inference_mode(), autocast(device, evaluator.dtype):
            x = rack(
                torch.from_numpy(task.inputs).to(device),
                causal=causal,
                times=torch.from_numpy(task.times.astype(np.float32)).to(device),
                segments=torch.from_numpy(own.segments(samples)).to(device),
            )
            rows = rack.head.features(x.reshape(-1, x.shape[-1])[targets.rows])
            scores, right = token_log_probabilities(rows, rack.head.weight, targets.tokens)
        asked_at = task.targets.rows.numpy()
        owners, n = asked_at // own.seq_len, len(part)
        labels = own.labels(samples)
        known = labels != NO_TARGET
        if causal:  # of the first token of a row nobody is asked
            known = np.zeros_like(known)
            known.reshape(-1)[asked_at + 1] = True
        asked, wanted = np.bincount(owners, minlength=n), known.sum(axis=1)
        share = wanted / np.maximum(1, asked) / draws
        for totals, values in (
            (nats, np.bincount(owners, -scores.double().cpu().numpy(), minlength=n) * share),
            (hits, np.bincount(owners, right.cpu().numpy(), minlength=n) * share),
            (counts, wanted / draws),
            (baseline, np.where(known, unigram[np.where(known, labels, 0)], 0.0).sum(axis=1) / draws),
        ):
            np.add.at(totals, places, values)
    return {
        **in_units(ratio(nats, counts), tokens.bytes_per_token),
        **(ratio(hits, counts).named("accuracy") if causal else {}),
        "unigram": in_units(ratio(baseline, counts), tokens.bytes_per_token),
    }
