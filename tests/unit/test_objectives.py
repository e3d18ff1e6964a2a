"""Masks, targets and the loss that is computed in chunks."""

import hashlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stackwise.config.evaluation import EvaluateParams
from stackwise.config.model import ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.data.tokens import TokenDataset, Tokens, Vocabulary
from stackwise.growth.init import initialize
from stackwise.inference.evaluation import Evaluator
from stackwise.model.rack import Head, RackShape
from stackwise.objectives import loss as loss_module
from stackwise.objectives.loss import target_loss, token_log_probabilities, weighted_cross_entropy
from stackwise.objectives.masks import draw_masks, mask_rate
from stackwise.objectives.targets import CausalObjective, MaskDiffusionObjective, Targets, masked_targets

CPU = torch.device("cpu")
VOCAB, WIDTH = 37, 16


def masks_of(params: ObjectiveParams, samples: Any, variants: Any, *, seed: int = 5, seq: int = 24) -> Any:
    samples, variants = np.broadcast_arrays(np.asarray(samples), np.asarray(variants))
    return draw_masks(params, seed=seed, samples=samples, variants=variants, seq=seq)


# --- masks


def test_masks_are_a_function_of_seed_sample_and_variant() -> None:
    params = ObjectiveParams()
    samples, variants = np.divmod(np.arange(60), 6)
    rates, masks = masks_of(params, samples, variants)
    order = np.random.default_rng(0).permutation(60)
    shuffled_rates, shuffled_masks = masks_of(params, samples[order], variants[order])
    assert np.array_equal(shuffled_rates, rates[order])
    assert np.array_equal(shuffled_masks, masks[order])
    for i in (0, 17, 59):  # alone, not in a batch
        rate, mask = masks_of(params, samples[i : i + 1], variants[i : i + 1])
        assert rate[0] == rates[i]
        assert np.array_equal(mask[0], masks[i])
    assert len(np.unique(masks, axis=0)) == 60
    assert len(np.unique(rates)) == 60
    other_rates, other_masks = masks_of(params, samples, variants, seed=6)
    assert not np.intersect1d(rates, other_rates).size
    assert not (masks == other_masks).all(axis=1).any()


def test_masks_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib, numpy as np\n"
        "from stackwise.config.objective import ObjectiveParams\n"
        "from stackwise.objectives.masks import draw_masks\n"
        "np.random.seed(1); np.random.random(7)\n"
        "r, m = draw_masks(ObjectiveParams(), seed=5, samples=np.arange(40), variants=np.arange(40) % 7, seq=24)\n"
        "print(hashlib.sha256(r.tobytes() + m.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rates, masks = masks_of(ObjectiveParams(), np.arange(40), np.arange(40) % 7)
    assert there.stdout.strip() == hashlib.sha256(rates.tobytes() + masks.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("distribution", "mean", "median"), [("uniform", 0.5, 0.5), ("cosine", 2 / math.pi, math.sin(math.pi / 4))]
)
def test_rates_follow_the_distribution(distribution: Any, mean: float, median: float) -> None:
    """Mean, median and range of 4000 rates; `cosine` favours high rates."""
    low, high = 0.2, 0.8
    params = ObjectiveParams(mask_min=low, mask_max=high, distribution=distribution)
    rates, _ = masks_of(params, np.arange(4000), 0, seq=2)
    shares = (rates - low) / (high - low)
    assert shares.min() >= 0
    assert shares.max() < 1
    assert shares.min() < 0.01
    assert shares.max() > 0.99
    assert abs(shares.mean() - mean) < 4 * shares.std() / math.sqrt(4000)
    assert abs(np.median(shares) - median) < 0.04
    quantiles = [mask_rate(params, u) for u in (0.0, 0.25, 0.5, 0.75)]
    assert np.allclose(np.quantile(rates, (0.0, 0.25, 0.5, 0.75)), quantiles, atol=0.02)


def test_bernoulli_counts_are_binomial() -> None:
    params = ObjectiveParams(mask_min=0.4, mask_max=0.4)
    rates, masks = masks_of(params, np.arange(3000), 0, seq=50)
    assert (rates == 0.4).all()
    counts = masks.sum(axis=1)
    assert abs(counts.mean() - 20) < 4 * math.sqrt(12 / 3000)
    assert counts.var() == pytest.approx(50 * 0.4 * 0.6, rel=0.12)
    assert np.abs(masks.mean(axis=0) - 0.4).max() < 4.5 * math.sqrt(0.24 / 3000)  # at every position


def test_exact_counts_are_exact() -> None:
    params = ObjectiveParams(count="exact")
    rates, masks = masks_of(params, np.arange(2000), 0, seq=50)
    assert masks.sum(axis=1).tolist() == [round(rate * 50) for rate in rates.tolist()]
    share = rates.mean()
    assert np.abs(masks.mean(axis=0) - share).max() < 0.06  # no position is favoured


@pytest.mark.parametrize("variants", [1, 2, 4, 5])
def test_variants_of_a_sample_are_stratified(variants: int) -> None:
    """Every M consecutive variants have one rate in each M-th of the range, in an order that differs by sample."""
    params = ObjectiveParams(mask_min=0.1, mask_max=0.9, variants=variants)
    samples, draws = np.divmod(np.arange(50 * 3 * variants), 3 * variants)
    rates, _ = masks_of(params, samples, draws, seq=4)
    strata = np.floor((rates - 0.1) / 0.8 * variants).astype(int).reshape(50, 3, variants)
    assert (np.sort(strata, axis=-1) == np.arange(variants)).all()
    if variants > 1:
        assert len(np.unique(strata[:, 0, 0])) == variants
    # a cycle's offset is its own
    offsets = (rates - 0.1) / 0.8 * variants % 1.0
    assert len(np.unique(offsets.reshape(50, 3, variants)[..., 0].round(9))) == 150


# --- targets


def test_masked_targets_name_rows_tokens_and_weights() -> None:
    tokens = np.arange(12).reshape(3, 4) + 100
    mask = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=bool)
    targets = masked_targets(tokens, mask, np.array([2.0, 3.0, 5.0]))
    assert targets.rows.tolist() == [0, 3, 9, 10, 11]
    assert targets.tokens.tolist() == [100, 103, 109, 110, 111]
    assert targets.weights.tolist() == [2, 2, 5, 5, 5]
    assert (targets.rows.dtype, targets.tokens.dtype, targets.weights.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    assert targets.batch_tokens == 12
    moved = targets.to(CPU)
    assert moved.rows.tolist() == targets.rows.tolist()
    assert moved.batch_tokens == 12


@pytest.mark.parametrize("weighting", ["plain", "nelbo"])
def test_mask_diffusion_hides_what_it_asks_for(weighting: Any) -> None:
    params = ObjectiveParams(weighting=weighting)
    objective = MaskDiffusionObjective(params, seed=5, mask_id=VOCAB)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (6, 24))
    samples, variants = np.arange(6) * 3, np.array([0, 1, 2, 3, 4, 9])
    task = objective(tokens, samples, variants)
    inputs, targets = task.inputs, task.targets
    rates, mask = masks_of(params, samples, variants)
    assert not objective.causal
    assert np.array_equal(task.times, rates)
    assert np.array_equal(inputs == VOCAB, mask)
    assert np.array_equal(inputs[~mask], tokens[~mask])
    assert targets.rows.tolist() == np.flatnonzero(mask).tolist()
    assert targets.tokens.tolist() == tokens[mask].tolist()
    of_sample = np.ones(6) if weighting == "plain" else 1 / rates
    expected = np.broadcast_to(of_sample[:, None], mask.shape)[mask]
    np.testing.assert_allclose(targets.weights.numpy(), expected, rtol=1e-6)


def test_loss_of_mlm_is_the_mean_over_the_masked_tokens() -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (6, 24))
    samples, variants = np.arange(6), np.zeros(6, int)
    plain = ObjectiveParams(mask_min=0.3, mask_max=0.3)
    sums, mean = (
        MaskDiffusionObjective(params, seed=5, mask_id=VOCAB)(tokens, samples, variants).targets
        for params in (plain, plain.model_copy(update={"type": "mlm"}))
    )
    assert torch.equal(mean.rows, sums.rows)
    assert float(mean.weights.sum() / mean.batch_tokens) == pytest.approx(1)
    assert float(sums.weights.sum() / sums.batch_tokens) == pytest.approx(len(sums.rows) / tokens.size)


def test_causal_objective_asks_for_every_next_token() -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 5))
    objective = CausalObjective()
    task = objective(tokens, np.arange(3), np.zeros(3, int))
    inputs, targets = task.inputs, task.targets
    assert objective.causal
    assert (task.times == 0).all()
    assert np.array_equal(inputs, tokens)
    assert targets.rows.tolist() == [r for r in range(15) if r % 5 != 4]  # the last position has no next token
    assert targets.tokens.tolist() == tokens[:, 1:].reshape(-1).tolist()
    assert (targets.weights == 1).all()


# --- the loss


def rows_of(n: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, projection, tokens and weights of `n` rows."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64).to(dtype) * 0.7
    return x, weight, torch.randint(0, VOCAB, (n,), generator=g), torch.rand(n, generator=g) + 0.1


def reference(x: Tensor, weight: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    return (weights.double() * F.cross_entropy(x.double() @ weight.double().T, tokens, reduction="none")).sum()


@pytest.fixture(params=[None, 1, 7], ids=["one chunk", "chunks of 64", "uneven chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk sizes: all rows at once, the smallest there is, and one that does not divide the rows."""
    if request.param == 1:
        monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", 1)
    elif request.param == 7:
        monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", 75 * VOCAB)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_cross_entropy_and_its_gradients(wants: tuple[bool, bool], dtype: torch.dtype) -> None:
    """Against `F.cross_entropy` of all logits in fp64; ours sums in fp32, so 1e-5 of the size is what it can keep."""
    x, weight, tokens, weights = rows_of(256, dtype=dtype)
    x.requires_grad_(wants[0])
    weight.requires_grad_(wants[1])
    found = weighted_cross_entropy(x, weight, tokens, weights)
    expected = reference(x, weight, tokens, weights)
    assert found.dtype == torch.float32
    assert found.requires_grad == any(wants)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    if not any(wants):
        return
    (found / 3).backward()  # what comes after it in the graph counts too
    grads = x.grad, weight.grad
    x.grad = weight.grad = None
    (expected / 3).backward()
    for wanted, grad, tensor in zip(wants, grads, (x, weight), strict=True):
        assert (grad is not None) == wanted
        if grad is not None and tensor.grad is not None:
            assert grad.dtype == dtype
            torch.testing.assert_close(grad, tensor.grad, rtol=0, atol=1e-5 * float(tensor.grad.abs().max()))


def test_gradients_are_those_of_finite_differences() -> None:
    """Nothing in common with another implementation of the gradient: the loss itself, moved a little along it."""
    x, weight, tokens, weights = rows_of(40, dtype=torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    weighted_cross_entropy(x, weight, tokens, weights).backward()
    step = 1e-3
    for tensor in (x, weight):
        assert tensor.grad is not None
        direction = tensor.grad / tensor.grad.norm()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                moved = [t + sign * step * direction if t is tensor else t for t in (x, weight)]
                values.append(float(reference(*moved, tokens, weights)))  # type: ignore[call-arg]
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(tensor.grad.norm()), rel=1e-4)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=["bf16", "fp16"])
def test_cross_entropy_under_autocast(dtype: torch.dtype, tolerance: float) -> None:
    """The products are rounded, the sums are not: as far from the truth as the format's precision allows."""
    x, weight, tokens, weights = rows_of(256)
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        found = weighted_cross_entropy(x, weight, tokens, weights)
    found.backward()
    grads = x.grad, weight.grad
    x.grad = weight.grad = None
    expected = reference(x, weight, tokens, weights)
    expected.backward()
    rounded = (x.to(dtype) @ weight.to(dtype).T).double()  # nothing but the product is rounded
    of_rounded = (weights * F.cross_entropy(rounded, tokens, reduction="none")).sum()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), of_rounded, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance / 20, atol=0)
    for grad, tensor in zip(grads, (x, weight), strict=True):
        assert grad is not None
        assert tensor.grad is not None
        assert grad.dtype == torch.float32
        error = (grad - tensor.grad).norm() / tensor.grad.norm()
        assert error < tolerance
        assert error > 0  # it did run in the lower precision


def test_small_gradients_survive_fp16() -> None:
    """The slope is rounded before the division by batch * seq, which would push it below what fp16 can hold."""
    x, weight, tokens, weights = rows_of(64)
    x.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        total = weighted_cross_entropy(x, weight, tokens, weights) / 2**24
    total.backward()
    assert x.grad is not None
    ours, x.grad = x.grad, None
    (reference(x, weight, tokens, weights) / 2**24).backward()
    assert x.grad is not None
    assert (ours - x.grad).norm() / x.grad.norm() < 5e-3


def test_no_rows_cost_nothing() -> None:
    x, weight, tokens, weights = rows_of(0)
    x.requires_grad_()
    weight.requires_grad_()
    found = weighted_cross_entropy(x, weight, tokens, weights)
    assert found.item() == 0
    found.backward()
    assert x.grad is not None
    assert x.grad.shape == (0, WIDTH)
    assert weight.grad is not None
    assert (weight.grad == 0).all()
    log_probabilities, hits = token_log_probabilities(x.detach(), weight.detach(), tokens)
    assert (len(log_probabilities), len(hits)) == (0, 0)


@pytest.mark.usefixtures("chunks")
def test_token_log_probabilities() -> None:
    x, weight, tokens, _ = rows_of(256)
    tokens[::2] = (x @ weight.T).argmax(1)[::2]
    log_probabilities, hits = token_log_probabilities(x, weight, tokens)
    logits = x.double() @ weight.double().T
    expected = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probabilities.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, logits.argmax(1) == tokens)
    assert hits[::2].all()
    assert not hits.all()


def head_and_batch(*, vocab: int = VOCAB, batch: int = 4, seq: int = 24) -> tuple[Head, Tensor, Targets]:
    head = Head(ModelParams(d_model=WIDTH), vocab)
    initialize(head, name="head", seed=0)
    x = torch.randn(batch, seq, WIDTH, generator=torch.Generator().manual_seed(0)) * 3
    objective = MaskDiffusionObjective(ObjectiveParams(weighting="nelbo"), seed=0, mask_id=vocab)
    tokens = np.random.default_rng(0).integers(0, vocab, (batch, seq))
    return head, x, objective(tokens, np.arange(batch), np.zeros(batch, int)).targets


def test_target_loss_is_the_mean_over_all_tokens_of_the_batch() -> None:
    head, x, targets = head_and_batch()
    x.requires_grad_()
    found = target_loss(head, x, targets)
    chosen = head(x).reshape(-1, VOCAB)[targets.rows]
    expected = (targets.weights * F.cross_entropy(chosen, targets.tokens, reduction="none")).sum() / (4 * 24)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    wanted = [x, head.norm.weight, head.projection.weight]
    for ours, theirs in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_target_loss_of_a_batch_without_targets() -> None:
    head, x, targets = head_and_batch()
    none = torch.zeros(0, dtype=torch.int64)
    loss = target_loss(head, x.requires_grad_(), Targets(none, none, torch.zeros(0), targets.batch_tokens))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert (x.grad == 0).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def test_logits_of_all_tokens_never_exist() -> None:
    """Every position is a target, yet no operation makes anything near [batch, seq, vocab], backward included."""
    vocab, batch, seq = 16384, 8, 128
    head, x, _ = head_and_batch(vocab=vocab, batch=batch, seq=seq)
    everything = np.ones((batch, seq), dtype=bool)
    targets = masked_targets(np.zeros((batch, seq), dtype=np.int64), everything, np.ones(batch))
    x.requires_grad_()
    with LargestTensor() as largest:
        target_loss(head, x, targets).backward()
    limit = loss_module._CHUNK_ELEMENTS["cpu"]
    assert 0 < largest.elements <= limit
    assert limit <= batch * seq * vocab / 8
    with LargestTensor() as naive:  # what it would be otherwise, and that the watch sees it
        head(x)
    assert naive.elements == batch * seq * vocab


# --- the bound


class FixedLogits(nn.Module):
    """A rack stub: whatever it reads, it predicts one distribution."""

    def __init__(self, log_probabilities: Tensor) -> None:
        super().__init__()
        self.head = nn.Module()
        self.shape = RackShape.of(ModelParams(), (1,), len(log_probabilities))
        self.head.features = nn.Identity()
        self.head.weight = log_probabilities[:, None]

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        return torch.ones(*tokens.shape, 1)


def evaluator(directory: Path, text: np.ndarray, vocab: int, *, seq: int = 32, **params: Any) -> Evaluator:
    np.save(directory / "tokens.npy", text.astype(np.uint16))
    data = TokenDataset(directory / "tokens.npy", seq)
    tokens = Tokens(data, data, Vocabulary(vocab, 0), np.bincount(text, minlength=vocab), 2.0, directory)
    return Evaluator(tokens, EvaluateParams(**params), seed=0, device=CPU, dtype="fp32")


def test_bound_of_a_uniform_predictor_is_log_vocabulary(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, VOCAB, 32 * 20)
    measured = evaluator(tmp_path, text, VOCAB).diffusion(FixedLogits(torch.zeros(VOCAB)))  # type: ignore[arg-type]
    assert measured["nelbo"]["nats_per_token"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert measured["nelbo"]["bits_per_byte_high"] == pytest.approx(measured["nelbo"]["bits_per_byte"], abs=1e-6)
    for at_rate in measured["masked"].values():
        assert at_rate["nats_per_token"] == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_bound_of_the_true_model_of_independent_tokens_is_their_entropy(tmp_path: Path) -> None:
    """Independent tokens: the true unigram is the true conditional, so the bound is tight."""
    probabilities = np.random.default_rng(1).dirichlet(np.ones(VOCAB))
    entropy = float(-(probabilities * np.log(probabilities)).sum())
    text = np.random.default_rng(2).choice(VOCAB, 32 * 500, p=probabilities)
    rack = FixedLogits(torch.from_numpy(probabilities).log().float())
    measured = evaluator(tmp_path, text, VOCAB, samples=500, draws=2).diffusion(rack)["nelbo"]  # type: ignore[arg-type]
    half = measured["nats_per_token_high"] - measured["nats_per_token"]
    assert 0 < half < 0.08
    assert abs(measured["nats_per_token"] - entropy) < 2 * half


def test_weighted_loss_is_an_unbiased_estimate_of_the_bound() -> None:
    """`nelbo` weighting over nearly the whole of (0, 1]: its mean over many masks is the entropy of such tokens."""
    probabilities = np.random.default_rng(1).dirichlet(np.ones(VOCAB))
    entropy = float(-(probabilities * np.log(probabilities)).sum())
    log_probabilities = torch.from_numpy(probabilities).log().float()
    params = ObjectiveParams(mask_min=0.05, mask_max=1.0, weighting="nelbo", variants=8)
    tokens = np.random.default_rng(2).choice(VOCAB, (1500, 64), p=probabilities)
    objective = MaskDiffusionObjective(params, seed=0, mask_id=VOCAB)
    losses = []
    for part in np.array_split(np.arange(1500), 100):
        targets = objective(tokens[part], part, np.zeros(len(part), int)).targets
        total = -(targets.weights * log_probabilities[targets.tokens]).sum() / targets.batch_tokens
        losses.append(float(total))
    error = np.std(losses, ddof=1) / 10
    assert error < 0.05
    assert abs(np.mean(losses) - entropy) < 4 * error
