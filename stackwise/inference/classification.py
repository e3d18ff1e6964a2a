"""What a classifier is worth on held-out rows."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from stackwise.config.evaluation import EvaluateParams
from stackwise.data.tokens import Tokens
from stackwise.finetuning.classifier import Classifier
from stackwise.inference.intervals import Estimate, proportion, ratio
from stackwise.objectives.targets import NO_TARGET
from stackwise.precision.dtypes import autocast

Metrics = dict[str, Any]
RESAMPLES = 1000
"""Bootstrap samples of an interval."""


def classification_metrics(
    model: Classifier, tokens: Tokens, params: EvaluateParams, *, seed: int, device: torch.device, dtype: str
) -> Metrics:
    """Accuracy and F1 on all held-out rows, beside the baseline that always says what is most frequent in training.

    The interval of the accuracy is Wilson's where each row has one label, else that of a ratio over the rows, whose
    labels depend on each other. That of the macro F1 is of `RESAMPLES` bootstrap samples of the rows (percentiles).

    Args:
        model: in evaluation mode, on the device.
        tokens: packed rows with labels.
        params: `batch_size` counts here.
        seed: of the bootstrap.
        device: computes.
        dtype: compute format.

    Returns:
        With their intervals `accuracy`, `f1_macro`, the mean of the F1 of all classes that occur, and `nats_per_label`,
        the mean cross-entropy; `f1` by label; `majority` with the baseline's `accuracy` and `f1_macro`; `rows` and
        `labels`, their numbers.
    """
    truth, said, row, nats = (
        np.concatenate(parts) for parts in zip(*_predicted(model, tokens, params, device, dtype), strict=True)
    )
    n_labels, rows = len(model.classes.labels), len(np.unique(row))
    pairs = truth * n_labels + said
    confusion = np.bincount(pairs, minlength=n_labels**2).reshape(n_labels, n_labels)
    majority = np.bincount(truth * n_labels + int(tokens.counts.argmax()), minlength=n_labels**2)
    row_number = np.unique(row, return_inverse=True)[1]
    weights = (truth == said).astype(np.float64), nats, np.ones(len(row))
    hits, own_nats, counts = (np.bincount(row_number, own, minlength=rows).astype(np.float64) for own in weights)
    accuracy = proportion(int(hits.sum()), rows) if model.classes.pooled else ratio(hits, counts)
    generator = np.random.default_rng([seed, *b"bootstrap"])
    resampled = []
    for _ in range(RESAMPLES):
        times = np.bincount(generator.integers(rows, size=rows), minlength=rows)[row_number]
        drawn = np.bincount(pairs, times, minlength=n_labels**2).reshape(n_labels, n_labels)
        resampled.append(_macro(_f1(drawn)))
    own = _f1(confusion)
    f1_low, f1_high = np.quantile(resampled, [0.025, 0.975])
    return {
        **accuracy.named("accuracy"),
        **Estimate(_macro(own), float(f1_low), float(f1_high)).named("f1_macro"),
        "f1": {name: f1 for name, f1 in zip(model.classes.labels, own.tolist(), strict=True) if not math.isnan(f1)},
        **ratio(own_nats, counts).named("nats_per_label"),
        "majority": {
            "accuracy": float(majority.reshape(n_labels, n_labels).trace() / len(truth)),
            "f1_macro": _macro(_f1(majority.reshape(n_labels, n_labels))),
        },
        "rows": rows,
        "labels": len(truth),
    }


def _f1(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """`2 TP / (2 TP + FP + FN)` of each class `[labels]`; not a number for one that neither is nor is said.

    Args:
        confusion: counts `[truth, said]`.
    """
    right = np.diag(confusion).astype(np.float64)
    found = confusion.sum(axis=0) + confusion.sum(axis=1)
    return np.divide(2 * right, found, out=np.full(len(right), np.nan), where=found > 0)


def _macro(f1: NDArray[np.float64]) -> float:
    """The mean over the classes that there are."""
    return float(np.nanmean(f1))


def _predicted(
    model: Classifier, tokens: Tokens, params: EvaluateParams, device: torch.device, dtype: str
) -> Iterator[tuple[NDArray[Any], ...]]:
    """Of each label of the held-out rows what is true, what the model says, a number of its row, and its cross-entropy
    (nats): four `[n]`."""
    own = tokens.validation
    samples = np.arange(len(own))
    for part in np.array_split(samples, math.ceil(len(samples) / params.batch_size)):
        labels, segments = own.labels(part), own.segments(part)
        with torch.inference_mode(), autocast(device, dtype):
            ids, of_rows = (torch.from_numpy(values).to(device) for values in (own.samples(part), segments))
            logits = model(ids, of_rows).float().cpu()
        asked = labels != NO_TARGET
        truth, chosen = torch.from_numpy(labels[asked]), logits[torch.from_numpy(asked)]
        nats = F.cross_entropy(chosen.double(), truth, reduction="none")
        rows = part[:, None] * own.seq_len + segments
        yield truth.numpy(), chosen.argmax(dim=-1).numpy(), rows[asked], nats.numpy()
