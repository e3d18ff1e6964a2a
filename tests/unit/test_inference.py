"""What a rack is worth on held-out text, and text from it."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.evaluation import EvaluateParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.data.tokens import TokenDataset, Tokens, Vocabulary
from stackwise.growth.init import initialize
from stackwise.inference.evaluation import Evaluator
from stackwise.model.embeddings import Embeddings
from stackwise.model.rack import Rack, RackShape

CPU = torch.device("cpu")
VOCAB, SEQ, SAMPLES = 17, 12, 30
BYTES_PER_TOKEN = 3.5
MODEL = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=24))


def new_rack(vocab: int = VOCAB) -> Rack:
    rack = Rack(RackShape.of(MODEL, (1, 1), vocab))
    for name, part in (("embeddings", rack.embeddings), ("stacks", rack.stacks), ("head", rack.head)):
        initialize(part, name=name, seed=0)
    with torch.no_grad():
        rack.embeddings.table.mul_(30)
        rack.embeddings.mask.mul_(30)
    return rack


def evaluator(directory: Path, text: np.ndarray, *, vocab: int = VOCAB, seed: int = 0, **params: Any) -> Evaluator:
    """For a validation split of the given samples; the training split is another text."""
    seq = text.shape[1]
    directory.mkdir(exist_ok=True)
    np.save(directory / "validation.npy", text.reshape(-1).astype(np.uint16))
    np.save(directory / "train.npy", np.zeros(seq, np.uint16))
    tokens = Tokens(
        train=TokenDataset(directory / "train.npy", seq),
        validation=TokenDataset(directory / "validation.npy", seq),
        vocabulary=Vocabulary(vocab, 0),
        counts=np.arange(vocab) * 3,
        bytes_per_token=BYTES_PER_TOKEN,
        tokenizer=directory,
    )
    return Evaluator(tokens, EvaluateParams(**params), seed=seed, device=CPU, dtype="fp32")


@pytest.fixture
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (SAMPLES, SEQ))


class Predictor(nn.Module):
    """A rack stub that predicts by rule and remembers what it was given."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.shape = RackShape.of(MODEL, (1,), vocab)
        self.embeddings = Embeddings(vocab, 1)
        self.vocab = vocab
        self.seen: list[Tensor] = []
        self.head: Any = nn.Linear(vocab, vocab, bias=False)
        self.head.weight = nn.Parameter(torch.eye(vocab))
        self.head.features = nn.Identity()

    def predict(self, tokens: Tensor) -> Tensor:
        """Log-probabilities `[batch, seq, vocab]`."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, *, causal: bool = False, cache: list[Tensor] | None = None, **_: Any) -> Tensor:
        n = tokens.shape[1]
        if cache is not None:
            cache.append(tokens)
            tokens = torch.cat(cache, dim=1)
        self.seen.append(tokens.clone())
        return self.predict(tokens)[:, -n:]

    def logits(self, tokens: Tensor, **_: Any) -> Tensor:
        found: Tensor = self.head(self(tokens))
        return found

    def new_cache(self, batch: int, capacity: int) -> list[Tensor]:
        return []


class ByPosition(Predictor):
    """Knows that token `position % vocab` stands at each position."""

    def predict(self, tokens: Tensor) -> Tensor:
        right = torch.arange(tokens.shape[1]) % self.vocab
        return (F.one_hot(right, self.vocab) * 50.0).expand(*tokens.shape, -1)


class ByMaskCount(Predictor):
    """Gives token 0 the probability 1 / (1 + share of the sample that is masked), the rest to token 1."""

    def predict(self, tokens: Tensor) -> Tensor:
        right = 1 / (1 + (tokens == self.vocab).float().mean(dim=1))
        logits = torch.full((*tokens.shape, self.vocab), -1e9)
        logits[..., 0], logits[..., 1] = right.log()[:, None], (1 - right).log()[:, None]
        return logits


# --- units and baseline


def test_units(tmp_path: Path, text: np.ndarray) -> None:
    found = evaluator(tmp_path, text).diffusion(new_rack())
    for figures in (found["nelbo"], *found["masked"].values()):
        expected = figures["nats_per_token"] / math.log(2) / BYTES_PER_TOKEN
        assert figures["bits_per_byte"] == pytest.approx(expected)
        assert figures["nats_per_token"] > 1
    assert list(found["masked"]) == ["0.15", "0.3", "0.5", "0.7", "0.9"]


def test_unigram_counts_training_and_scores_validation(tmp_path: Path, text: np.ndarray) -> None:
    counts = np.arange(VOCAB) * 3 + 1
    nats = -np.log(counts / counts.sum())[text]
    found = evaluator(tmp_path, text).unigram()
    assert found["nats_per_token"] == pytest.approx(nats.mean())
    error = nats.mean(axis=1).std(ddof=1) / math.sqrt(SAMPLES) / math.log(2) / BYTES_PER_TOKEN
    half = 2.04522964 * error  # Student's t with 29 degrees of freedom
    assert found["bits_per_byte_high"] - found["bits_per_byte"] == pytest.approx(half)
    assert found["bits_per_byte"] - found["bits_per_byte_low"] == pytest.approx(half)


def test_the_interval_of_one_sample_is_a_point(tmp_path: Path, text: np.ndarray) -> None:
    found = evaluator(tmp_path, text[:1]).unigram()
    assert found["bits_per_byte_low"] == found["bits_per_byte"] == found["bits_per_byte_high"]


def test_the_interval_covers_the_truth(tmp_path: Path) -> None:
    """In 40 sets of data it holds the truth about as often as it should."""
    probabilities = np.random.default_rng(1).dirichlet(np.ones(VOCAB))
    counts = np.arange(VOCAB) * 3 + 1
    truth = float(-(probabilities * np.log(counts / counts.sum())).sum()) / math.log(2) / BYTES_PER_TOKEN
    within = 0
    for seed in range(40):
        samples = np.random.default_rng(seed).choice(VOCAB, (SAMPLES, SEQ), p=probabilities)
        found = evaluator(tmp_path, samples).unigram()
        within += found["bits_per_byte_low"] < truth < found["bits_per_byte_high"]
    assert 34 <= within <= 40


def test_samples_are_spread_over_the_split(tmp_path: Path) -> None:
    """Five of 30, from the first to the last."""
    text = np.repeat(np.arange(30)[:, None] % VOCAB, SEQ, axis=1)
    rack = ByPosition()
    evaluator(tmp_path, text, samples=5).next_token(rack)  # type: ignore[arg-type]
    assert rack.seen[0][:, 0].tolist() == [i % VOCAB for i in (0, 7, 14, 22, 29)]


# --- diffusion


def test_a_model_that_knows_is_right_everywhere(tmp_path: Path) -> None:
    samples = np.tile(np.arange(SEQ) % VOCAB, (SAMPLES, 1))
    found = evaluator(tmp_path, samples).diffusion(ByPosition())  # type: ignore[arg-type]
    assert found["nelbo"]["nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert [at["accuracy"] for at in found["masked"].values()] == [1.0] * 5
    wrong = evaluator(tmp_path, samples[:, ::-1]).diffusion(ByPosition())  # type: ignore[arg-type]
    assert [at["accuracy"] for at in wrong["masked"].values()] == [0.0] * 5


def test_every_rate_masks_its_share(tmp_path: Path, text: np.ndarray) -> None:
    rack = ByPosition()
    at = evaluator(tmp_path, text, mask_rates=[0.01, 0.5, 1.0], batch_size=7)
    at.diffusion(rack)  # type: ignore[arg-type]
    batches = math.ceil(SAMPLES / 7)
    of_rates = [torch.cat(rack.seen[-batches * (3 - i) :][:batches]) for i in range(3)]
    for seen, masked in zip(of_rates, (1, 6, 12), strict=True):  # at least one token is masked
        hidden = seen == VOCAB
        assert (hidden.sum(dim=1) == masked).all()
        assert torch.equal(seen[~hidden], torch.from_numpy(text)[~hidden])
    half = of_rates[1] == VOCAB
    assert (of_rates[0] == VOCAB)[~half].sum() == 0  # the same order of positions at every rate
    assert len(torch.unique(half, dim=0)) > 25  # another one for every sample


def test_bound_masks_every_number_of_tokens_alike(tmp_path: Path, text: np.ndarray) -> None:
    rack = ByPosition()
    evaluator(tmp_path, text, draws=8, mask_rates=[0.5]).diffusion(rack)  # type: ignore[arg-type]
    hidden = torch.cat(rack.seen[: math.ceil(SAMPLES * 8 / 32)]) == VOCAB
    counts = torch.bincount(hidden.sum(dim=1), minlength=SEQ + 1)
    assert counts[0] == 0
    assert counts[1:].sum() == SAMPLES * 8
    assert (counts[1:] - SAMPLES * 8 / SEQ).abs().max() <= 2  # a low-discrepancy sequence, not chance


def test_bound_is_the_mean_over_the_number_of_masked_tokens(tmp_path: Path) -> None:
    """A model whose loss depends on how much is masked: its bound has a closed form."""
    samples = np.zeros((SAMPLES, SEQ), dtype=np.int64)
    found = evaluator(tmp_path, samples, draws=64).diffusion(ByMaskCount())  # type: ignore[arg-type]
    expected = np.log(1 + np.arange(1, SEQ + 1) / SEQ).mean()
    assert found["nelbo"]["nats_per_token"] == pytest.approx(expected, rel=2e-3)
    assert found["masked"]["0.5"]["nats_per_token"] == pytest.approx(math.log(1.5), rel=1e-5)


def test_bound_is_a_bound(tmp_path: Path) -> None:
    """Over all texts there are, the likelihoods that it promises cannot add up to more than one."""
    vocab, seq = 3, 3
    everything = np.array(list(itertools.product(range(vocab), repeat=seq)))
    at = evaluator(tmp_path, everything, vocab=vocab, draws=300, batch_size=500, mask_rates=[1.0])
    rack, bounds = new_rack(vocab), []
    for i, one in enumerate(everything):
        alone = evaluator(tmp_path / str(i), one[None], vocab=vocab, draws=60, batch_size=60, mask_rates=[1.0])
        bounds.append(alone.diffusion(rack)["nelbo"]["nats_per_token"] * seq)
    total = np.exp(-np.array(bounds)).sum()
    assert 0.3 < total <= 1.0
    together = at.diffusion(rack)["nelbo"]["nats_per_token"] * seq
    assert together == pytest.approx(np.mean(bounds), rel=0.03)


def test_masked_loss_is_that_of_the_masked_logits(tmp_path: Path, text: np.ndarray) -> None:
    rack = new_rack()
    spy = ByPosition()
    at = evaluator(tmp_path, text, mask_rates=[0.3], batch_size=SAMPLES)
    at.diffusion(spy)  # type: ignore[arg-type]
    inputs = spy.seen[-1]
    with torch.no_grad():
        logits = rack.logits(inputs)
    hidden, truth = inputs == VOCAB, torch.from_numpy(text)
    nats = F.cross_entropy(logits[hidden], truth[hidden])
    found = at.diffusion(rack)["masked"]["0.3"]
    assert found["nats_per_token"] == pytest.approx(float(nats), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits[hidden].argmax(-1) == truth[hidden]).float().mean()))


def test_figures_depend_on_seed_alone(tmp_path: Path, text: np.ndarray) -> None:
    rack = new_rack()
    at = evaluator(tmp_path, text)
    found = at.diffusion(rack)
    assert at.diffusion(rack) == found
    other_batches = evaluator(tmp_path, text, batch_size=7).diffusion(rack)
    assert other_batches["nelbo"]["nats_per_token"] == pytest.approx(found["nelbo"]["nats_per_token"], rel=1e-5)
    other_masks = evaluator(tmp_path, text, seed=1).diffusion(rack)
    assert other_masks["nelbo"]["nats_per_token"] != found["nelbo"]["nats_per_token"]
    at_bf16 = Evaluator(at.tokens, at.params, seed=0, device=CPU, dtype="bf16").diffusion(rack)
    assert at_bf16["nelbo"]["nats_per_token"] == pytest.approx(found["nelbo"]["nats_per_token"], rel=2e-2)
    assert at_bf16 != found


# --- next token


def test_next_token_loss_is_that_of_the_causal_logits(tmp_path: Path, text: np.ndarray) -> None:
    rack = new_rack()
    found = evaluator(tmp_path, text, batch_size=8).next_token(rack)
    tokens = torch.from_numpy(text)
    with torch.no_grad():
        logits = rack.logits(tokens, causal=True)[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found["nats_per_token"] == pytest.approx(float(nats), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == tokens[:, 1:]).float().mean()))
    assert found["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) / BYTES_PER_TOKEN, rel=1e-5)
