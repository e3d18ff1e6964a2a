"""What a rack is worth on held-out text."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stackwise.config.evaluation import EvaluateParams
from stackwise.data.tokens import Tokens
from stackwise.errors import UserError
from stackwise.model.context import segments_of_documents
from stackwise.model.rack import Rack
from stackwise.objectives.held_out import BoundObjective, masked_task, spread
from stackwise.objectives.loss import token_log_probabilities
from stackwise.objectives.targets import NO_TARGET, CausalObjective, CustomObjective, Task
from stackwise.precision.dtypes import autocast

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """Measures racks on the validation split, always on the same samples and masks."""

    tokens: Tokens
    params: EvaluateParams
    seed: int
    device: torch.device
    dtype: str

    def unigram(self, *, labelled: bool = False) -> Metrics:
        """The baseline that knows only how often each token occurs in training (add-one smoothing).

        Args:
            labelled: whether it predicts the labels where there are any, instead of all tokens.

        Raises:
            UserError: the held-out documents have no labels.
        """
        smoothed = self.tokens.counts + 1.0
        nats = -np.log(smoothed / smoothed.sum())
        if not labelled:
            return self._in_units(nats[self.tokens.validation.samples(self._chosen())].mean(axis=1))
        of_samples = (own[own != NO_TARGET] for own in self.tokens.validation.labels(self._chosen()))
        return self._in_units(np.array([nats[own].mean() for own in of_samples if len(own)]))

    def diffusion(self, rack: Rack) -> Metrics:
        """NELBO, and masked NLL and accuracy at fixed mask rates."""
        return {
            "nelbo": self._nelbo(rack),
            "masked": {f"{rate:g}": self._at_rate(rack, rate) for rate in self.params.mask_rates},
        }

    def next_token(self, rack: Rack) -> Metrics:
        """NLL and accuracy of the next token with causal attention, over all positions that have one."""
        objective, nats, hits = CausalObjective(), [], []
        for samples in self._batches():
            tokens = self.tokens.validation.samples(samples)
            losses, right = self._score(rack, objective(tokens, samples, np.zeros_like(samples)), tokens, causal=True)
            nats.append(losses.reshape(len(samples), -1).mean(axis=1))
            hits.append(right)
        return {**self._in_units(np.concatenate(nats)), "accuracy": float(np.concatenate(hits).mean())}

    def labelled(self, rack: Rack, *, causal: bool) -> Metrics:
        """NLL and accuracy of the labels that come with the held-out documents, over all positions that have one.

        Args:
            rack: the model.
            causal: whether a position may only look back.

        Raises:
            UserError: the held-out documents have no labels.
        """
        objective, nats, hits = CustomObjective(self.tokens.validation, causal), [], []
        for samples in self._batches():
            tokens = self.tokens.validation.samples(samples)
            task = objective(tokens, samples, np.zeros_like(samples))
            losses, right = self._score(rack, task, tokens, causal=causal)
            owner = task.targets.rows.numpy() // self._seq
            nats += [losses[owner == i].mean() for i in np.unique(owner)]
            hits.append(right)
        if not nats:
            raise UserError(
                "data.labels_column: none of the held-out samples that are measured has a label; raise "
                "evaluate.samples or data.validation_fraction, or give documents with labels"
            )
        return {**self._in_units(np.array(nats)), "accuracy": float(np.concatenate(hits).mean())}

    def _nelbo(self, rack: Rack) -> Metrics:
        """`BoundObjective`, a few draws for each sample."""
        chosen, draws = self._chosen(), self.params.draws
        objective = BoundObjective(self.seed, self.tokens.vocabulary.mask_id)
        pairs, nats = np.arange(len(chosen) * draws), []
        for part in np.array_split(pairs, math.ceil(len(pairs) / self.params.batch_size)):
            samples = chosen[part // draws]
            tokens = self.tokens.validation.samples(samples)
            nats.append(self._masked_nats(rack, objective(tokens, samples, part), tokens)[0])
        return self._in_units(np.concatenate(nats).reshape(len(chosen), draws).mean(axis=1))

    def _at_rate(self, rack: Rack, rate: float) -> Metrics:
        nats, hits = [], []
        for samples in self._batches():
            tokens = self.tokens.validation.samples(samples)
            # Draws beyond those of the NELBO, and the same for every model and rate.
            rates, draws, mask_id = np.full(len(samples), rate), -1 - samples, self.tokens.vocabulary.mask_id
            task = masked_task(tokens, rates, draws, seed=self.seed, mask_id=mask_id)
            losses, right = self._masked_nats(rack, task, tokens)
            nats.append(losses)
            hits.append(right)
        return {**self._in_units(np.concatenate(nats)), "accuracy": float(np.concatenate(hits).mean())}

    def _masked_nats(self, rack: Rack, task: Task, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean cross-entropy of each sample's masked tokens `[n]` (nats) and whether each token was the likeliest."""
        losses, hits = self._score(rack, task, tokens, causal=False)
        counts = np.bincount(task.targets.rows.numpy() // self._seq)
        starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        return np.add.reduceat(losses, starts) / counts, hits

    def _score(self, rack: Rack, task: Task, tokens: np.ndarray, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
        """Cross-entropy of each target (nats, fp64) and whether it was the likeliest token."""
        on_device, segments = task.targets.to(self.device), None
        if rack.shape.model.document_mask:
            segments = segments_of_documents(torch.from_numpy(tokens), self.tokens.vocabulary.eos_id).to(self.device)
        times = torch.from_numpy(task.times.astype(np.float32)).to(self.device)
        with torch.inference_mode(), autocast(self.device, self.dtype):
            x = rack(torch.from_numpy(task.inputs).to(self.device), causal=causal, times=times, segments=segments)
            rows = rack.head.features(x.reshape(-1, x.shape[-1])[on_device.rows])
            log_probabilities, hits = token_log_probabilities(rows, rack.head.weight, on_device.tokens)
        return -log_probabilities.double().cpu().numpy(), hits.cpu().numpy()

    def _chosen(self) -> np.ndarray:
        """The samples that are measured."""
        return spread(len(self.tokens.validation), self.params.samples)

    def _batches(self) -> list[np.ndarray]:
        chosen = self._chosen()
        return np.array_split(chosen, math.ceil(len(chosen) / self.params.batch_size))

    @property
    def _seq(self) -> int:
        return self.tokens.validation.seq_len

    def _in_units(self, nats: np.ndarray) -> Metrics:
        """Mean over samples of nats per token `[samples]`, with its standard error, also in bits per byte."""
        to_bits = 1.0 / (math.log(2) * self.tokens.bytes_per_token)
        mean = float(nats.mean())
        error = float(nats.std(ddof=1) / math.sqrt(len(nats))) if len(nats) > 1 else 0.0
        return {
            "nats_per_token": mean,
            "bits_per_byte": mean * to_bits,
            "standard_error_bits_per_byte": error * to_bits,
        }
