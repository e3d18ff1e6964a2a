"""What a rack is worth on held-out text."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stackwise.config.evaluation import EvaluateParams
from stackwise.data.tokens import Tokens
from stackwise.errors import UserError
from stackwise.inference.depth import boundaries
from stackwise.inference.intervals import Estimate, mean, ratio
from stackwise.model.context import segments_of_documents
from stackwise.model.rack import Rack
from stackwise.objectives.held_out import BoundObjective, masked_task, spread
from stackwise.objectives.loss import token_log_probabilities
from stackwise.objectives.targets import NO_TARGET, CausalObjective, CustomObjective, Objective, Task
from stackwise.precision.dtypes import autocast

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """Measures racks on the validation split, always on the same samples and masks.

    Every figure `x` comes with the ends of its 95 % interval over the samples, `x_low` and `x_high`.
    """

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
        return {"nelbo": self._nelbo(rack, every_depth=False)[-1], "masked": self.masked(rack)}

    def masked(self, rack: Rack) -> Metrics:
        """NLL and accuracy of the masked tokens by mask rate."""
        return {f"{rate:g}": self.at_rate(rack, rate)[-1] for rate in self.params.mask_rates}

    def next_token(self, rack: Rack) -> Metrics:
        """NLL and accuracy of the next token with causal attention, over all positions that have one."""
        return self._answers(rack, CausalObjective(), every_depth=False)[-1]

    def labelled(self, rack: Rack, *, causal: bool) -> Metrics:
        """NLL and accuracy of the labels that come with the held-out documents, over all positions that have one.

        Args:
            rack: the model.
            causal: whether a position may only look back.

        Raises:
            UserError: the held-out documents have no labels.
        """
        return self._answers(rack, CustomObjective(self.tokens.validation, causal), every_depth=False)[-1]

    def by_depth(self, rack: Rack, figure: str, *, causal: bool) -> list[Metrics]:
        """What the rack is worth if it stops after stack k and its final norm and head read boundary k + 1.

        Args:
            rack: the model.
            figure: `nelbo`, `next_token` or `labelled`; each as the method of that name has it.
            causal: of `labelled`.

        Returns:
            The figure at boundaries 0 to K; the last is that of the whole rack.
        """
        if figure == "nelbo":
            return self._nelbo(rack, every_depth=True)
        of_labels = CustomObjective(self.tokens.validation, causal)
        return self._answers(rack, CausalObjective() if figure == "next_token" else of_labels, every_depth=True)

    def at_rate(self, rack: Rack, rate: float, *, every_depth: bool = False) -> list[Metrics]:
        """NLL and accuracy of the masked tokens where the share `rate` of all is masked: of the whole rack, or at each
        of the boundaries 0 to K."""

        def asked() -> Iterator[tuple[Task, np.ndarray]]:
            for samples, tokens in self._batches():
                # Draws beyond those of the NELBO, and the same for every model and rate.
                rates, draws, mask_id = np.full(len(samples), rate), -1 - samples, self.tokens.vocabulary.mask_id
                yield masked_task(tokens, rates, draws, seed=self.seed, mask_id=mask_id), tokens

        return self._measured(rack, asked(), causal=False, every_depth=every_depth)

    def _nelbo(self, rack: Rack, *, every_depth: bool) -> list[Metrics]:
        """`BoundObjective`, a few draws for each sample."""
        chosen, draws = self._chosen(), self.params.draws
        objective = BoundObjective(self.seed, self.tokens.vocabulary.mask_id)
        pairs, nats = np.arange(len(chosen) * draws), []
        for part in np.array_split(pairs, math.ceil(len(pairs) / self.params.batch_size)):
            samples = chosen[part // draws]
            tokens = self.tokens.validation.samples(samples)
            task = objective(tokens, samples, part)
            losses, _ = self._score(rack, task, tokens, causal=False, every_depth=every_depth)
            sums, targets = _by_sample(losses, self._owners(task))
            nats.append(sums / targets)
        of_draws = np.concatenate(nats, axis=1)
        return [self._in_units(own.reshape(len(chosen), draws).mean(axis=1)) for own in of_draws]

    def _answers(self, rack: Rack, objective: Objective, *, every_depth: bool) -> list[Metrics]:
        """Of an objective that masks nothing."""
        asked = ((objective(tokens, samples, np.zeros_like(samples)), tokens) for samples, tokens in self._batches())
        return self._measured(rack, asked, causal=objective.causal, every_depth=every_depth)

    def _measured(
        self, rack: Rack, asked: Iterable[tuple[Task, np.ndarray]], *, causal: bool, every_depth: bool
    ) -> list[Metrics]:
        """NLL (mean over samples of the mean over their targets) and accuracy (share of all targets) at each depth.

        Raises:
            UserError: nothing is asked for.
        """
        nats, hits, counts = [], [], []
        for task, tokens in asked:
            losses, right = self._score(rack, task, tokens, causal=causal, every_depth=every_depth)
            owners = self._owners(task)
            of_samples, targets = _by_sample(losses, owners)
            nats.append(of_samples / targets)
            hits.append(_by_sample(right, owners)[0])
            counts.append(targets)
        of_samples, right, targets = (np.concatenate(parts, axis=-1) for parts in (nats, hits, counts))
        if not len(targets):
            raise UserError(
                "data.labels_column: none of the held-out samples that are measured has a label; raise "
                "evaluate.samples or data.validation_fraction, or give documents with labels"
            )
        return [
            {**self._in_units(own), **ratio(hit, targets).named("accuracy")}
            for own, hit in zip(of_samples, right, strict=True)
        ]

    def _score(
        self, rack: Rack, task: Task, tokens: np.ndarray, *, causal: bool, every_depth: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cross-entropy of each target (nats, fp64) and whether it was the likeliest token, `[depths, n]` each."""
        on_device, segments = task.targets.to(self.device), None
        if rack.shape.model.document_mask:
            segments = segments_of_documents(torch.from_numpy(tokens), self.tokens.vocabulary.eos_id).to(self.device)
        times = torch.from_numpy(task.times.astype(np.float32)).to(self.device)
        inputs, found = torch.from_numpy(task.inputs).to(self.device), []
        with torch.inference_mode(), autocast(self.device, self.dtype):
            if every_depth:
                depths = boundaries(rack, inputs, causal=causal, times=times, segments=segments)
            else:
                depths = iter((rack(inputs, causal=causal, times=times, segments=segments),))
            for x in depths:
                rows = rack.head.features(x.reshape(-1, x.shape[-1])[on_device.rows])
                found.append(token_log_probabilities(rows, rack.head.weight, on_device.tokens))
        losses, hits = (torch.stack(parts).cpu() for parts in zip(*found, strict=True))
        return -losses.double().numpy(), hits.numpy()

    def _owners(self, task: Task) -> np.ndarray:
        """The sample in the batch of each target `[n]`."""
        owners: np.ndarray = task.targets.rows.numpy() // self._seq
        return owners

    def _chosen(self) -> np.ndarray:
        """The samples that are measured."""
        return spread(len(self.tokens.validation), self.params.samples)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of samples `[batch]` and their tokens `[batch, seq]`."""
        chosen = self._chosen()
        for samples in np.array_split(chosen, math.ceil(len(chosen) / self.params.batch_size)):
            yield samples, self.tokens.validation.samples(samples)

    @property
    def _seq(self) -> int:
        return self.tokens.validation.seq_len

    def _in_units(self, nats: np.ndarray) -> Metrics:
        """Mean over samples of nats per token `[samples]`, also in bits per byte."""
        return in_units(mean(nats), self.tokens.bytes_per_token)


def in_units(nats: Estimate, bytes_per_token: float) -> Metrics:
    """Nats per token, also in bits per byte, which compares models of different tokenizers."""
    bits = nats.scaled(1.0 / (math.log(2) * bytes_per_token))
    return {**nats.named("nats_per_token"), **bits.named("bits_per_byte")}


def _by_sample(values: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the targets' values `[depths, n]` over each sample that has any `[depths, samples]`, and how many it has
    `[samples]`; `owners` `[n]` rise."""
    counts = np.bincount(owners)
    counts = counts[counts > 0]
    starts = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(counts) else np.zeros(0, int)
    sums = np.add.reduceat(values, starts, axis=1, dtype=np.float64) if len(counts) else np.zeros((len(values), 0))
    return sums, counts.astype(np.float64)
