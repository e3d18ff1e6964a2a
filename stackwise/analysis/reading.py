"""A rack read on held-out text: what its boundaries hold, and where its heads look."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stackwise.analysis.attention import distance, entropy, watched
from stackwise.data.tokens import Tokens
from stackwise.inference.depth import boundaries
from stackwise.model.context import segments_of_documents
from stackwise.model.rack import Rack
from stackwise.objectives.held_out import masked_task, spread
from stackwise.precision.dtypes import autocast


@dataclass(frozen=True)
class Condition:
    """How a rack is used."""

    causal: bool
    rate: float | None = None
    """Share of the tokens that is masked; None: none is."""


@dataclass(frozen=True)
class Reader:
    """Reads racks on the validation split, always the same samples under the same masks."""

    tokens: Tokens
    samples: int
    seed: int
    device: torch.device
    dtype: str
    batch_size: int = 32

    def boundaries(self, rack: Rack, condition: Condition) -> list[Tensor]:
        """Boundaries 0 to K on the CPU, `[samples * seq, d_model]` fp32 each."""
        found: list[list[Tensor]] = [[] for _ in range(len(rack.stacks) + 1)]
        for inputs, shown in self._batches(condition):
            for k, x in enumerate(self._through(rack, condition, inputs, shown)):
                found[k].append(x.float().flatten(0, 1).cpu())
        return [torch.cat(parts) for parts in found]

    def heads(self, rack: Rack, condition: Condition) -> dict[int, "Heads"]:
        """Where the heads of each layer look; layers of attention by kernels are left out."""
        sums: dict[int, list[Tensor]] = {}

        def see(layer: int, weights: Tensor) -> None:
            own = torch.stack([part.mean(-1).sum(0).double() for part in (entropy(weights), distance(weights))]).cpu()
            sums.setdefault(layer, []).append(own)

        with watched(rack, see):
            for inputs, shown in self._batches(condition):
                self._through(rack, condition, inputs, shown)
        n = len(self._chosen())
        return {layer: Heads(*(part.tolist() for part in torch.stack(own).sum(0) / n)) for layer, own in sums.items()}

    def maps(self, rack: Rack, condition: Condition) -> dict[int, Tensor]:
        """The weights of each layer `[n_heads, seq, seq]` on the first sample, on the CPU."""
        found: dict[int, Tensor] = {}

        def see(layer: int, weights: Tensor) -> None:
            found[layer] = weights[0].cpu()

        inputs, shown = next(self._batches(condition))
        with watched(rack, see):
            self._through(rack, condition, inputs[:1], shown[:1])
        return found

    def lens(self, rack: Rack, condition: Condition) -> "Lens":
        """What each boundary of the first sample already predicts, read by the rack's final norm and head
        (nostalgebraist 2020, the logit lens)."""
        inputs, shown = next(self._batches(condition))
        probabilities, likeliest = [], []
        with torch.inference_mode(), autocast(self.device, self.dtype):
            for x in self._through(rack, condition, inputs[:1], shown[:1]):
                best = rack.head(x[0]).float().softmax(-1).max(-1)
                probabilities.append(best.values.cpu())
                likeliest.append(best.indices.cpu())
        return Lens(
            torch.from_numpy(inputs[0]), torch.from_numpy(shown[0]), torch.stack(likeliest), torch.stack(probabilities)
        )

    def _through(self, rack: Rack, condition: Condition, inputs: np.ndarray, shown: np.ndarray) -> list[Tensor]:
        """The boundaries of a batch `[batch, seq, d_model]`.

        Args:
            rack: the model.
            condition: how it is used.
            inputs: what it sees `[batch, seq]`.
            shown: the same without masks.
        """
        segments = None
        if rack.shape.model.document_mask:
            segments = segments_of_documents(torch.from_numpy(shown), self.tokens.vocabulary.eos_id).to(self.device)
        share = torch.from_numpy((inputs == self.tokens.vocabulary.mask_id).mean(axis=1).astype(np.float32))
        with torch.inference_mode(), autocast(self.device, self.dtype):
            ids, times = torch.from_numpy(inputs).to(self.device), share.to(self.device)
            return list(boundaries(rack, ids, causal=condition.causal, times=times, segments=segments))

    def _batches(self, condition: Condition) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What the rack sees of the samples `[batch, seq]`, and the same without masks."""
        chosen = self._chosen()
        for samples in np.array_split(chosen, -(-len(chosen) // self.batch_size)):
            tokens = self.tokens.validation.samples(samples)
            if condition.rate is None:
                yield tokens, tokens
                continue
            rates, mask_id = np.full(len(samples), condition.rate), self.tokens.vocabulary.mask_id
            yield masked_task(tokens, rates, -1 - samples, seed=self.seed, mask_id=mask_id).inputs, tokens

    def _chosen(self) -> np.ndarray:
        return spread(len(self.tokens.validation), self.samples)


@dataclass(frozen=True)
class Heads:
    """Where the heads of a layer look, averaged over queries and samples."""

    entropy: list[float]
    """Of each head (bits)."""
    distance: list[float]
    """Of each head (tokens)."""


@dataclass(frozen=True)
class Lens:
    """What each boundary of a text predicts."""

    inputs: Tensor
    """What the rack sees `[seq]`."""
    tokens: Tensor
    """The same without masks `[seq]`."""
    likeliest: Tensor
    """The likeliest token at each position, by boundary `[K + 1, seq]`."""
    probabilities: Tensor
    """What it is given `[K + 1, seq]`."""
