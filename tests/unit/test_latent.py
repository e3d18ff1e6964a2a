"""Attention over softmax scores: latents beside standard and grouped heads; decoding caches, leaks, positions."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stackwise.attention.dense import DenseAttention
from stackwise.attention.latent import LatentAttention, LatentProjections
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.growth.init import initialize
from stackwise.model.context import Context
from stackwise.model.rack import Rack, RackShape
from stackwise.model.rope import rotary_table
from stackwise.model.stack import Block

D_MODEL, VOCAB = 32, 19
BATCH, SEQ = 2, 12
ATTENTION = {
    "standard": AttentionParams(n_heads=4, rope_theta=100.0),
    "standard-qk-norm": AttentionParams(n_heads=4, qk_norm=True, rope_theta=100.0),
    "gqa": AttentionParams(type="gqa", n_heads=4, n_kv_heads=2, rope_theta=100.0),
    "mla": AttentionParams(type="mla", n_heads=4, mla_rq=10, mla_rkv=12, rope_theta=100.0),
    "mla-direct-queries": AttentionParams(type="mla", n_heads=4, mla_rkv=12, mla_v_dim=5, rope_theta=100.0),
    "mla-yarn": AttentionParams(
        type="mla",
        n_heads=4,
        mla_rkv=12,
        mla_rope_dim=6,
        mla_nope_dim=7,
        mla_v_dim=5,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_len=8,
    ),
}
every_type = pytest.mark.parametrize("name", ATTENTION)


def model_of(attention: AttentionParams) -> ModelParams:
    assert not attention.problems()
    return ModelParams(d_model=D_MODEL, attention=attention, mlp=MLPParams(hidden=48))


def build(name: str) -> Rack:
    """A rack of three blocks with random weights, in float64."""
    rack = Rack(RackShape.of(model_of(ATTENTION[name]), (2, 1), VOCAB)).double()
    for part, module in rack.named_children():
        initialize(module, name=part, seed=0)
    return rack.eval()


def build_attention(name: str) -> DenseAttention | LatentAttention:
    attention = Block(model_of(ATTENTION[name])).double().attention
    assert isinstance(attention, DenseAttention | LatentAttention)
    initialize(attention, name="attention", seed=0)
    return attention.eval()


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(seed))


def some_inputs(seq: int = SEQ) -> Tensor:
    return torch.randn(BATCH, seq, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def documents() -> Tensor:
    """Segments of three documents, not at the same places in all samples."""
    return torch.tensor([[0] * 4 + [1] * 3 + [2] * 5, [0] * 6 + [1] * 1 + [2] * 5])


# --- decoding


@every_type
@pytest.mark.parametrize("prefill", [0, 1, 5])
@pytest.mark.parametrize("packed", [False, True], ids=["one-text", "packed"])
def test_decoding_with_the_cache_is_one_full_pass(name: str, prefill: int, packed: bool) -> None:
    """A prefill, then single tokens, then several at once."""
    rack, tokens = build(name), some_tokens()
    segments = documents() if packed else None
    cache = rack.new_cache(BATCH, SEQ)
    cuts = sorted({0, prefill, *range(prefill, 9), SEQ})
    with torch.no_grad():
        expected = rack(tokens, causal=True, segments=segments)
        found = [
            rack(
                tokens[:, begin:end],
                causal=True,
                segments=None if segments is None else segments[:, :end],
                cache=cache,
            )
            for begin, end in pairwise(cuts)
        ]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-12)
    assert {block.length for stack in cache for block in stack} == {SEQ}


def test_cache_of_latents_has_the_size_of_the_formula() -> None:
    attention = ATTENTION["mla"]
    assert attention.mla_rkv is not None
    per_token = attention.mla_rkv + attention.rope_dim(D_MODEL // attention.n_heads)
    assert per_token == 12 + 4
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = build_attention("mla").new_cache(3, 7, torch.device("cpu"), dtype)
        assert layer.bytes() == 3 * 7 * per_token * dtype.itemsize
    latents, standard, grouped = (
        sum(block.bytes() for stack in build(name).new_cache(3, 7) for block in stack)
        for name in ("mla", "standard", "gqa")
    )
    assert latents == 3 * layer_bytes(per_token)
    assert standard == 3 * layer_bytes(2 * D_MODEL)
    assert grouped == standard / 2


def layer_bytes(numbers: int) -> int:
    """Of a block's cache for 3 samples of 7 tokens in float64."""
    return 3 * 7 * numbers * 8


def test_decoding_makes_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = build_attention("mla"), some_inputs()
    cache = attention.new_cache(BATCH, SEQ, x.device, x.dtype)
    context = Context(causal=True)
    with torch.no_grad():
        attention(x[:, :5], context, cache)
        monkeypatch.setattr(LatentProjections, "keys_values", None)
        attention(x[:, 5:6], context, cache)


class Adapted(nn.Module):
    """A projection that is more than its matrix, as adapters and quantized weights make it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.base(x)


def test_decoding_with_an_adapted_projection_is_one_full_pass() -> None:
    attention, x = build_attention("mla"), some_inputs()
    assert isinstance(attention, LatentAttention)
    plain = attention(x, Context(causal=True))
    adapted = Adapted(attention.projections.kv_b_proj)
    attention.projections.kv_b_proj = adapted  # type: ignore[assignment]
    cache = attention.new_cache(BATCH, SEQ, x.device, x.dtype)
    context = Context(causal=True)
    with torch.no_grad():
        expected = attention(x, context)
        found = torch.cat([attention(x[:, i : i + 1], context, cache) for i in range(SEQ)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(plain, expected, atol=1e-2)


# --- who sees whom


@every_type
@pytest.mark.parametrize("packed", [False, True], ids=["one-text", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_positions_see_what_they_may_and_nothing_else(name: str, causal: bool, packed: bool) -> None:
    """The gradient of each position's output says which positions it depends on."""
    attention = build_attention(name)
    segments = documents() if packed else torch.zeros(BATCH, SEQ, dtype=torch.long)
    allowed = segments[:, :, None] == segments[:, None, :]
    if causal:
        allowed = allowed.tril()
    x = some_inputs().requires_grad_()
    out = attention(x, Context(causal=causal, segments=segments if packed else None))
    for position in range(SEQ):
        (grad,) = torch.autograd.grad(out[:, position].square().sum(), x, retain_graph=True)
        assert torch.equal((grad != 0).any(dim=-1), allowed[:, position])


@every_type
def test_packed_documents_are_as_if_alone(name: str) -> None:
    """Relative positions make a document at the end of a sample the same as at its beginning."""
    rack, tokens = build(name), some_tokens()
    for causal in (True, False):
        with torch.no_grad():
            packed = rack(tokens, causal=causal, segments=documents())
            for sample, begin, end in ((0, 0, 4), (0, 4, 7), (0, 7, 12), (1, 0, 6), (1, 7, 12)):
                alone = rack(tokens[sample : sample + 1, begin:end], causal=causal)
                torch.testing.assert_close(packed[sample, begin:end], alone[0], rtol=0, atol=1e-6)


@every_type
def test_causal_and_bidirectional_use_differ(name: str) -> None:
    rack, tokens = build(name), some_tokens()
    with torch.no_grad():
        assert (rack(tokens, causal=True) - rack(tokens)).abs().amax(dim=-1).min() > 1e-3


# --- positions


@every_type
def test_only_relative_positions_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = build_attention(name), some_inputs()
    module = type(attention).__module__
    with torch.no_grad():
        for causal in (True, False):
            context = Context(causal=causal)
            here = attention(x, context)
            with monkeypatch.context() as patch:
                patch.setattr(f"{module}.rotary_table", lambda start, *rest: rotary_table(start + 29, *rest))
                torch.testing.assert_close(attention(x, context), here, rtol=0, atol=1e-5)
            with monkeypatch.context() as patch:
                patch.setattr(f"{module}.rotary_table", lambda start, *rest: rotary_table(0 * start, *rest)[::-1])
                assert (attention(x, context) - here).abs().max() > 1e-2  # but they do count


def test_rotary_key_is_shared_by_all_heads() -> None:
    projections = LatentProjections(model_of(ATTENTION["mla"]), 2).double()
    initialize(projections, name="projections", seed=0)
    q, k, v = projections(some_inputs(), 3)
    assert q.shape == (BATCH, 4, SEQ, projections.qk_dim)
    assert k.shape == (BATCH, 2, SEQ, projections.qk_dim)
    assert v.shape == (BATCH, 2, SEQ, projections.v_dim)
    dim = projections.rope_dim
    assert torch.equal(k[:, 0, :, -dim:], k[:, 1, :, -dim:])
    assert not torch.allclose(k[:, 0, :, :-dim], k[:, 1, :, :-dim])


# --- parameters


def test_widths_follow_the_parameters() -> None:
    def widths(**params: Any) -> tuple[int, int, int, int]:
        p = LatentProjections(model_of(AttentionParams(type="mla", n_heads=2, mla_rkv=8, **params)), 2)
        return p.nope_dim, p.rope_dim, p.v_dim, p.rank

    assert widths() == (8, 8, 16, 8)
    assert widths(head_dim=20) == (10, 10, 20, 8)
    assert widths(mla_rope_dim=6) == (10, 6, 16, 8)
    assert widths(mla_nope_dim=3, mla_v_dim=7) == (3, 8, 7, 8)


def test_direct_queries_are_the_null_of_the_query_rank() -> None:
    def names(rank: int | None) -> set[str]:
        params = AttentionParams(type="mla", n_heads=4, mla_rkv=8, mla_rq=rank)
        return {name.removesuffix(".weight") for name in LatentProjections(model_of(params), 4).state_dict()}

    assert names(None) == {"q_proj", "kv_a_proj", "kv_a_norm", "kv_b_proj"}
    assert names(6) == {"q_a_proj", "q_a_norm", "q_b_proj", "kv_a_proj", "kv_a_norm", "kv_b_proj"}


def test_latents_have_no_norm_of_heads() -> None:
    ((key, problem),) = AttentionParams(type="mla", mla_rkv=8, qk_norm=True).problems()
    assert key == "qk_norm"
    assert "has no effect with attention type mla" in problem


@every_type
def test_dropout_acts_in_training_alone(name: str) -> None:
    params = model_of(ATTENTION[name].model_copy(update={"dropout": 0.5}))
    plain, dropping = build_attention(name), type(build_attention(name))(params).double()
    dropping.load_state_dict(plain.state_dict())
    x, context = some_inputs(), Context()
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.allclose(dropping.train()(x, context), plain.train()(x, context), atol=1e-2)
        assert torch.equal(plain.train()(x, context), plain.eval()(x, context))
        torch.testing.assert_close(dropping.eval()(x, context), plain(x, context), rtol=0, atol=1e-12)
        # what is dropped is made up for: the mean is as without
        mean = torch.stack([dropping.train()(x, context) for _ in range(400)]).mean(dim=0)
    torch.testing.assert_close(mean, plain(x, context), rtol=0, atol=0.3)


# --- grouped heads


def test_grouped_heads_share_keys_and_values() -> None:
    """A key head for each query head is standard attention; fewer are standard attention with repeated heads."""
    standard = build_attention("standard")
    for groups in (4, 2, 1):
        params = replace_heads(groups)
        grouped = DenseAttention(model_of(params)).double()
        initialize(grouped, name="attention", seed=0)
        with torch.no_grad():
            for name, weight in grouped.state_dict().items():
                if name.startswith(("k_", "v_")):
                    heads = weight.view(groups, -1, D_MODEL).repeat_interleave(4 // groups, dim=0)
                    weight = heads.reshape(D_MODEL, D_MODEL)
                standard.get_parameter(name).copy_(weight)
            for causal in (True, False):
                context = Context(causal=causal)
                expected = standard(some_inputs(), context)
                torch.testing.assert_close(grouped(some_inputs(), context), expected, rtol=0, atol=1e-12)


def replace_heads(groups: int) -> AttentionParams:
    return ATTENTION["gqa"].model_copy(update={"n_kv_heads": groups})


# --- formats


@every_type
def test_autocast_changes_no_more_than_rounding(name: str) -> None:
    rack, tokens = build(name).float(), some_tokens()
    exact = rack(tokens, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = rack(tokens, causal=True)
        rounded.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rack.stacks.parameters())
    assert float((rounded - exact).detach().norm() / exact.detach().norm()) < 0.02
