"""How likely a rack finds a text after a prompt: exactly for causal models, by a bound for diffusion models."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from stackwise.data.tokenizer import encode
from stackwise.data.tokens import Vocabulary
from stackwise.errors import UserError
from stackwise.model.rack import Rack
from stackwise.objectives.draws import generator
from stackwise.objectives.loss import token_log_probabilities
from stackwise.precision.dtypes import autocast

_STREAM = 0x73636F72
_GOLDEN = (5**0.5 - 1) / 2

Ids = Sequence[int]


@dataclass(frozen=True)
class Question:
    """A text and what stands before it, as token ids."""

    prompt: Ids
    """May be empty."""
    text: Ids
    """At least one."""


@dataclass(frozen=True)
class Score:
    """How likely a text is after its prompt."""

    nats: float
    """Its log-probability, or a lower bound of that."""
    greedy: bool
    """Whether the model writes it by itself, if it always takes the likeliest."""


class Scorer(Protocol):
    """Whoever scores texts."""

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """A score for each question. Of a prompt that is too long the end counts."""
        ...


def question(tokenizer: Any, prompt: str, text: str) -> Question:
    """`prompt` and `text` as token ids: those of both together, cut where the prompt alone has its last common token.

    So a token in which the two merge belongs to the text.

    Args:
        tokenizer: of `transformers`.
        prompt: may be empty.
        text: not empty.
    """
    alone, whole = encode(tokenizer, [prompt, prompt + text])
    same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    cut = min(same, len(whole) - 1)
    return Question(whole[:cut], whole[cut:])


@dataclass(frozen=True)
class CausalScorer:
    """`sum_i log p(text_i | prompt, text_<i)`. An empty prompt is the end of another text."""

    rack: Rack
    vocabulary: Vocabulary
    device: torch.device
    dtype: str = "fp32"
    batch_size: int = 32
    seq_len: int | None = None
    """The most tokens of prompt and text together (None: any number)."""

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """As `Scorer` says."""
        found: list[Score] = []
        for part in _batches(questions, self.batch_size):
            # Position i predicts token i + 1: the last token is not read. What pads stands where nobody looks.
            room = None if self.seq_len is None else self.seq_len + 1
            rows = [_cut(q, room, first=self.vocabulary.eos_id) for q in part]
            tokens = _padded([(*prompt, *text[:-1]) for prompt, text in rows], self.vocabulary.eos_id)
            asked = [range(len(p) - 1, len(p) + len(t) - 1) for p, t in rows]
            log_probabilities, hits = self._read(tokens.to(self.device), asked, [t for _, t in rows])
            for own, hit in zip(log_probabilities, hits, strict=True):
                found.append(Score(float(own.sum()), bool(hit.all())))
        return found

    def _read(self, tokens: Tensor, asked: list[range], texts: list[Ids]) -> tuple[list[Tensor], list[Tensor]]:
        rows = torch.tensor([i * tokens.shape[1] + at for i, own in enumerate(asked) for at in own])
        targets = torch.tensor([token for text in texts for token in text])
        with torch.inference_mode(), autocast(self.device, self.dtype):
            x = self.rack(tokens, causal=True, times=torch.zeros(len(tokens), device=self.device))
            return _log_probabilities(self.rack, x, rows, targets, [len(text) for text in texts])


@dataclass(frozen=True)
class BoundScorer:
    """The conditional evidence lower bound of mask-diffusion (Nie et al. 2025, LLaDA, equation 6, algorithm 3).

    Of a text of L tokens n are masked, n uniform on 1 ... L, and the prompt is in sight: `log p(text | prompt)` is at
    least the expectation of `L / n` times the sum of the masked tokens' log-probabilities. Where all `2^L - 1` masks
    are no more than `draws`, the expectation is computed exactly. Otherwise the n of the draws form a low-discrepancy
    sequence, and masks depend on the seed and the prompt alone, so that the texts of a prompt are compared under the
    same draws.
    """

    rack: Rack
    vocabulary: Vocabulary
    device: torch.device
    seed: int
    draws: int = 32
    dtype: str = "fp32"
    batch_size: int = 32
    """Masked texts at a time."""
    seq_len: int | None = None
    """The most tokens of prompt and text together (None: any number)."""
    greedy: bool = False
    """Whether to find out what the model writes by itself: up to L more passes a text."""

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """As `Scorer` says."""
        rows = [_cut(q, self.seq_len, first=None) for q in questions]
        masks = [self._masks(prompt, len(text)) for prompt, text in rows]
        jobs = [(i, mask, weight) for i, of_text in enumerate(masks) for mask, weight in of_text]
        bounds = [0.0] * len(rows)
        for part in _batches(jobs, self.batch_size):
            found = self._read([rows[i] for i, _, _ in part], [mask for _, mask, _ in part])
            for (i, _, weight), log_probabilities in zip(part, found, strict=True):
                bounds[i] += weight * float(log_probabilities.sum())
        written = [self.greedy and self._is_greedy(prompt, text) for prompt, text in rows]
        return [Score(bound, own) for bound, own in zip(bounds, written, strict=True)]

    def _masks(self, prompt: Ids, length: int) -> list[tuple[np.ndarray, float]]:
        """Masks of a text `[length]` (bool) and what the masked tokens' sum counts in the expectation."""
        if 2 ** min(length, 64) - 1 <= self.draws:
            return [
                (np.isin(np.arange(length), chosen), 1.0 / (n * comb(length, n)))
                for n in range(1, length + 1)
                for chosen in combinations(range(length), n)
            ]
        found = []
        key = crc32(np.asarray(prompt, dtype=np.int64).tobytes())
        for draw in range(self.draws):
            n = 1 + int((draw * _GOLDEN + 0.5) % 1.0 * length)
            order = np.argsort(generator(self.seed, _STREAM, key, draw).random(length), kind="stable")
            mask = np.zeros(length, dtype=bool)
            mask[order[:n]] = True
            found.append((mask, length / n / self.draws))
        return found

    def _read(self, rows: Sequence[tuple[Ids, Ids]], masks: Sequence[np.ndarray]) -> list[Tensor]:
        """Log-probabilities of the masked tokens of each text."""
        x, places = self._residual(rows, masks)
        flat = torch.tensor([i * x.shape[1] + at for i, own in enumerate(places) for at in own])
        hidden = [np.asarray(text)[mask] for (_, text), mask in zip(rows, masks, strict=True)]
        targets = torch.from_numpy(np.concatenate(hidden).astype(np.int64))
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return _log_probabilities(self.rack, x, flat, targets, list(map(len, hidden)))[0]

    def _residual(self, rows: Sequence[tuple[Ids, Ids]], masks: Sequence[np.ndarray]) -> tuple[Tensor, list[list[int]]]:
        """The residual stream of masked texts, and the places of what is masked."""
        inputs, places, shares = [], [], []
        for (prompt, text), mask in zip(rows, masks, strict=True):
            shown = np.where(mask, self.vocabulary.mask_id, np.asarray(text))
            inputs.append((*prompt, *shown.tolist()))
            places.append((len(prompt) + np.flatnonzero(mask)).tolist())
            shares.append(float(mask.sum()) / len(inputs[-1]))
        tokens = _padded(inputs, self.vocabulary.eos_id).to(self.device)
        segments = None
        if len({len(own) for own in inputs}) > 1:  # what pads is a segment of its own, which nobody sees
            lengths = torch.tensor([len(own) for own in inputs])
            segments = (torch.arange(tokens.shape[1]) >= lengths[:, None]).long().to(self.device)
        times = torch.tensor(shares, device=self.device)
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return self.rack(tokens, times=times, segments=segments), places

    def _is_greedy(self, prompt: Ids, text: Ids) -> bool:
        """Whether unmasking the most confident prediction first, one at a time, writes the text."""
        mask = np.ones(len(text), dtype=bool)
        while mask.any():
            x, (places,) = self._residual([(prompt, text)], [mask])
            with torch.inference_mode(), autocast(self.device, self.dtype):
                confidence, likeliest = self.rack.head(x[0, places]).float().softmax(-1).max(-1)
            surest = int(confidence.argmax())
            at = places[surest] - len(prompt)
            if int(likeliest[surest]) != text[at]:
                return False
            mask[at] = False
        return True


def _cut(question: Question, seq_len: int | None, *, first: int | None) -> tuple[Ids, Ids]:
    """Prompt and text, the prompt without its beginning if both are too long; `first` stands for an empty prompt.

    Raises:
        UserError: the text alone is too long.
    """
    prompt = question.prompt if question.prompt or first is None else (first,)
    if seq_len is None:
        return prompt, question.text
    room = seq_len - len(question.text)
    if room < (first is not None):
        raise UserError(
            f"a text to score has {len(question.text)} tokens, more than the model has learned to read at once: give "
            "shorter texts, or a greater seq_len, at which it may do worse"
        )
    return prompt[max(0, len(prompt) - room) :], question.text


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _padded(rows: Sequence[Ids], fill: int) -> Tensor:
    """`[n, longest]` int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _log_probabilities(
    rack: Rack, x: Tensor, rows: Tensor, targets: Tensor, lengths: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of targets `[n]` at rows `[n]` of the flattened residual stream `[batch, seq, d_model]`, and whether each is the
    likeliest; cut into `lengths`."""
    features = rack.head.features(x.reshape(-1, x.shape[-1])[rows.to(x.device)])
    found, hits = token_log_probabilities(features, rack.head.weight, targets.to(x.device))
    return list(found.double().cpu().split(lengths)), list(hits.cpu().split(lengths))
