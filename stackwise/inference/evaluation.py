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
from stackwise.objectives.loss import token_log_probabilities
from stackwise.objectives.masks import draw_mask
from stackwise.objectives.targets import NO_TARGET, CausalObjective, CustomObjective, Task, masked_targets
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
        """The negative evidence lower bound over mask rates (0, 1].

        Of a sample's seq tokens n are masked, n uniform on 1 ... seq, and the mean cross-entropy of the masked is its
        expectation: the form of the bound with the least variance (Ou et al. 2024, equation 3.5; Nie et al. 2025,
        equation 6). The n of all (sample, draw) pairs form a low-discrepancy sequence.
        """
        seq, draws = self._seq, self.params.draws
        chosen = self._chosen()
        pairs = np.arange(len(chosen) * draws)
        phase = (pairs * ((math.sqrt(5) - 1) / 2) + 0.5) % 1.0
        masked = 1 + np.minimum((phase * seq).astype(int), seq - 1)
        nats = np.empty(len(pairs))
        for part in np.array_split(pairs, math.ceil(len(pairs) / self.params.batch_size)):
            nats[part] = self._masked_nats(rack, chosen[part // draws], masked[part] / seq, part)[0]
        return self._in_units(nats.reshape(len(chosen), draws).mean(axis=1))

    def _at_rate(self, rack: Rack, rate: float) -> Metrics:
        nats, hits = [], []
        for samples in self._batches():
            # Draw ids beyond those of the NELBO, and the same for every model and rate.
            losses, right = self._masked_nats(rack, samples, np.full(len(samples), rate), -1 - samples)
            nats.append(losses)
            hits.append(right)
        return {**self._in_units(np.concatenate(nats)), "accuracy": float(np.concatenate(hits).mean())}

    def _masked_nats(
        self, rack: Rack, samples: np.ndarray, rates: np.ndarray, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean cross-entropy of each sample's masked tokens `[n]` (nats) and whether each token was the likeliest."""
        tokens = self.tokens.validation.samples(samples)
        mask = np.stack(
            [
                draw_mask(
                    np.random.default_rng([self.seed, draw % 2**32]), max(rate, 1 / self._seq), self._seq, exact=True
                )
                for rate, draw in zip(rates.tolist(), draws.tolist(), strict=True)
            ]
        )
        inputs, counts = np.where(mask, self.tokens.vocabulary.mask_id, tokens), mask.sum(axis=1)
        task = Task(inputs, masked_targets(tokens, mask, np.ones(len(tokens))), counts / self._seq)
        losses, hits = self._score(rack, task, tokens, causal=False)
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
        """The samples that are measured, spread evenly over the split."""
        n = len(self.tokens.validation)
        return np.linspace(0, n - 1, min(n, self.params.samples)).round().astype(np.int64)

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
