"""What is measured inside racks, against matrices and layers whose answers are known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.analysis.attention import attention_weights, distance, entropy, uniform, watched
from stackwise.analysis.reading import Condition, Reader
from stackwise.analysis.similarity import cka, effective_rank, unbiased_hsic
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.growth.init import initialize
from stackwise.inference.depth import boundaries, costs
from stackwise.model.context import Context
from stackwise.model.parts import build_attention
from stackwise.model.rack import Rack, RackShape
from tests.unit.small import CPU, SEQ, VOCAB, new_rack, tokens_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


# --- similarity


def rotation(n: int) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=9).double()).Q


def test_similarity_does_not_see_rotations_scales_and_shifts() -> None:
    x = normal(500, 12).double()
    found = cka([x, 3 * x @ rotation(12) + 5], generator=generator())
    assert found == pytest.approx(torch.ones(2, 2).numpy(), abs=1e-9)


def test_similarity_sees_anything_else() -> None:
    x = normal(2048, 8).double()
    half = torch.cat((x[:, :4], normal(2048, 4, seed=1).double()), dim=1)
    found = cka([x, normal(2048, 8, seed=2).double(), half], generator=generator())
    assert abs(float(found[0, 1])) < 0.01  # without bias: that of the plain estimate would be 8 / 256
    # |Y'X|^2 / (|X'X| |Y'Y|) of two that share 4 of 8 independent directions
    assert float(found[0, 2]) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(found, found.T)


def test_the_criterion_by_hand() -> None:
    """Equation 5 of Song et al. for a matrix with nothing but ones besides its diagonal, which does not count."""
    n = 5
    ones = torch.ones(n, n, dtype=torch.float64)
    total = n * (n - 1)
    expected = (total + total**2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * n * (n - 1) ** 2) / (n * (n - 3))
    assert float(unbiased_hsic(ones, 7 * ones)) == pytest.approx(7 * expected)
    assert expected == pytest.approx(0)  # a constant kernel knows nothing
    k = torch.zeros(4, 4, dtype=torch.float64)
    k[0, 1] = k[1, 0] = k[2, 3] = k[3, 2] = 1.0
    # products 4, sums 4 * 4 / 6, rows 2 / 2 * 4
    assert float(unbiased_hsic(k, k)) == pytest.approx((4 + 16 / 6 - 4) / 4)


def test_effective_rank_by_hand() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))) == pytest.approx(1, abs=1e-6)
    shares = [3 / 4, 1 / 4]
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares))
    )
    x = normal(50, 6)
    assert effective_rank(2 * x @ rotation(6).float()) == pytest.approx(effective_rank(x), rel=1e-5)


# --- attention

VARIANTS = {
    "MHA": {"n_heads": 4},
    "qk_norm": {"n_heads": 4, "qk_norm": True},
    "GQA": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "MLA": {"type": "mla", "n_heads": 4, "mla_rkv": 8, "mla_rq": 6},
    "YaRN": {"n_heads": 4, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 8},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_weights_are_those_of_the_layer(settings: dict[str, Any], causal: bool, documents: bool) -> None:
    """Their rows sum to 1, none looks where it must not, and by them the values become the layer's output."""
    params = ModelParams(d_model=16, attention=AttentionParams(**settings), mlp=MLPParams(hidden=8))
    layer = build_attention(params)
    initialize(layer, name="layer", seed=0)
    x = normal(3, 9, 16)
    segments = torch.tensor([[0] * 4 + [1] * 5] * 3) if documents else None
    context = Context(causal=causal, segments=segments)
    found = attention_weights(layer, x, context)
    assert found is not None
    weights, values = found
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    if causal:
        assert weights.triu(1).abs().max() == 0
    if documents:
        assert weights[:, :, 5:, :4].abs().max() == 0
    mixed = (weights @ values).transpose(1, 2).reshape(3, 9, -1)
    own: Any = layer
    assert torch.allclose(own.o_proj(mixed), layer(x, context), atol=1e-6)


def test_kernels_have_no_weights() -> None:
    for attention in (
        AttentionParams(type="kernel", n_heads=2),
        AttentionParams(type="mlgka", n_heads=2, n_kv_heads=1, mla_rkv=8),
    ):
        params = ModelParams(d_model=16, attention=attention, mlp=MLPParams(hidden=8))
        assert attention_weights(build_attention(params), normal(1, 4, 16), Context()) is None


def test_watching_changes_nothing_and_ends() -> None:
    rack, seen = new_rack(), []
    tokens = torch.tensor([[1, 2, 3, VOCAB]])
    before = rack.logits(tokens)
    with watched(rack, lambda layer, weights: seen.append((layer, weights.shape))):
        assert torch.equal(rack.logits(tokens), before)
    rack.logits(tokens)
    assert seen == [(0, (1, 2, 4, 4)), (1, (1, 2, 4, 4))]


def test_entropy_and_distance_by_hand() -> None:
    one, all_alike = torch.eye(8), uniform(8, causal=False)
    assert torch.equal(entropy(one), torch.zeros(8))
    assert torch.allclose(entropy(all_alike), torch.full((8,), 3.0))
    assert torch.equal(distance(one), torch.zeros(8))
    assert float(distance(all_alike)[0]) == pytest.approx(3.5)
    assert torch.equal(distance(torch.eye(8).roll(1, 1))[:-1], torch.ones(7))
    back = uniform(8, causal=True)
    assert float(entropy(back)[3]) == pytest.approx(2)
    assert float(distance(back)[4]) == pytest.approx(2)


# --- racks


def reader(directory: Path, n: int = 6) -> Reader:
    tokens = tokens_of(directory, np.random.default_rng(0).integers(0, VOCAB, (n, SEQ)))
    return Reader(tokens, samples=n, seed=0, device=CPU, dtype="fp32", batch_size=4)


@pytest.mark.parametrize("condition", [Condition(True), Condition(False, 0.5), Condition(False)])
def test_the_last_boundary_is_the_model(condition: Condition, tmp_path: Path) -> None:
    rack, at = new_rack(), reader(tmp_path)
    found = at.boundaries(rack, condition)
    assert [x.shape for x in found] == [(6 * SEQ, 16)] * 3
    inputs, shown = next(at._batches(condition))
    assert (inputs == VOCAB).mean() == (condition.rate or 0)
    with torch.no_grad():
        logits = rack.logits(torch.from_numpy(inputs), causal=condition.causal)
    assert torch.allclose(rack.head(found[-1])[: inputs.size], logits.flatten(0, 1), atol=1e-6)
    lens = at.lens(rack, condition)
    assert torch.equal(lens.likeliest[-1], logits[0].argmax(-1))
    assert torch.allclose(lens.probabilities[-1], logits[0].softmax(-1).amax(-1), atol=1e-6)
    assert torch.equal(lens.inputs == VOCAB, torch.from_numpy(inputs[0] == VOCAB))
    assert torch.equal(lens.tokens, torch.from_numpy(shown[0]))


def test_heads_are_averages_of_maps(tmp_path: Path) -> None:
    rack, at, condition = new_rack(), reader(tmp_path, n=1), Condition(True)
    maps, heads = at.maps(rack, condition), at.heads(rack, condition)
    assert maps.keys() == heads.keys() == {0, 1}
    for layer, own in maps.items():
        assert own.shape == (2, SEQ, SEQ)
        assert heads[layer].entropy == pytest.approx(entropy(own).mean(-1).tolist(), rel=1e-6)
        assert heads[layer].distance == pytest.approx(distance(own).mean(-1).tolist(), rel=1e-6)


def test_boundaries_end_in_what_the_rack_returns() -> None:
    params = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=8))
    rack = Rack(
        RackShape.of(
            params.model_copy(update={"time": params.time.model_copy(update={"mode": "input"})}), (1, 2), VOCAB
        )
    )
    initialize(rack, name="rack", seed=0)
    tokens, times = torch.randint(0, VOCAB, (2, 6), generator=generator()), torch.tensor([0.2, 0.7])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    found = list(boundaries(rack, tokens, causal=True, times=times, segments=segments))
    assert len(found) == 3
    assert torch.equal(found[-1], rack(tokens, causal=True, times=times, segments=segments))


def test_operations_by_hand() -> None:
    """Of each block 4 projections of attention and 3 of the feed-forward network, and what attention itself does."""
    rack, tokens = new_rack(), torch.randint(0, VOCAB, (3, SEQ), generator=generator())
    found = costs(rack, tokens, causal=False, dtype="fp32")
    head, block = 2 * 16 * VOCAB, 2 * 16 * (4 * 16 + 3 * 24) + 2 * 2 * SEQ * 16
    assert [cost.operations for cost in found] == [head, head + block, head + 2 * block]
    assert all(cost.seconds > 0 for cost in found)
