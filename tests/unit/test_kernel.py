"""Kernel attention, by heads (`kernel`) and with latents (`mlgka`): exact forms, masks, decoding, random features."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.attention.features import build_features
from stackwise.attention.kernel import attend_by_features
from stackwise.attention.linear import CHUNK, linear_attention
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.growth.init import initialize
from stackwise.growth.window import Window
from stackwise.model.context import Context
from stackwise.model.parts import build_attention
from stackwise.model.rack import Rack, RackShape, empty_rack

D_MODEL, HEADS, KV_HEADS = 16, 4, 2
SHIFT_INVARIANT = ("gaussian", "laplacian", "uniform")
RANDOM = (*SHIFT_INVARIANT, "softmax")
FAMILIES = (*RANDOM, "linear")
TYPES: dict[str, dict[str, Any]] = {
    "kernel": {"type": "kernel", "n_kv_heads": KV_HEADS, "qk_norm": True},
    "mlgka": {"type": "mlgka", "n_kv_heads": KV_HEADS, "mla_rkv": 6, "mla_rq": 10, "mla_nope_dim": 4, "mla_v_dim": 6},
}
each_type = pytest.mark.parametrize("type", TYPES)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def model_of(type: str, **keys: Any) -> ModelParams:
    attention = AttentionParams(n_heads=HEADS, **TYPES[type] | keys)
    assert attention.problems() == []
    return ModelParams(d_model=D_MODEL, attention=attention, mlp=MLPParams(hidden=8))


def random_features(n_kv_heads: int, width: int, *, seed: int = 0, **keys: Any) -> Any:
    """A feature map in float64, drawn."""
    features = build_features(AttentionParams(type="kernel", **keys), n_kv_heads, width).double()
    initialize(features, name="features", seed=seed)
    return features


def build(type: str, **keys: Any) -> Any:
    """An attention in float64, its weights drawn."""
    attention = build_attention(model_of(type, **keys))
    initialize(attention, name="attention", seed=0)
    return attention.double()


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def documents(batch: int, seq: int, seed: int = 0) -> Tensor:
    """Contiguous segments, other ones in each sample; the last is padding with a number of its own."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(batch, seq, generator=generator) < 4 / seq
    segments = ends.long().cumsum(1)
    segments[:, seq - seq // 8 :] = -1
    assert all(len(row.unique()) > 2 for row in segments)
    return segments


def visible(segments: Tensor | None, batch: int, seq: int, causal: bool) -> Tensor:
    """Which position sees which `[batch, 1, seq, seq]`, straight from the definition."""
    seen = torch.ones(batch, 1, seq, seq, dtype=torch.bool)
    if segments is not None:
        seen = (segments[:, :, None] == segments[:, None, :])[:, None]
    return seen.tril() if causal else seen


def quadratic(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of kernel values `[batch, heads, seq, seq]`."""
    weights = torch.where(seen, weights, 0)
    return weights @ v / weights.sum(-1, keepdim=True)


def exact_kernel(family: str, q: Tensor, k: Tensor, s: float = 1.0) -> Tensor:
    """`[..., n, d]`, `[..., m, d]` -> `[..., n, m]`."""
    if family == "softmax":
        return torch.exp(q @ k.mT / math.sqrt(q.shape[-1]))
    if family == "linear":
        return torch.where(q > 0, q + 1, q.exp()) @ torch.where(k > 0, k + 1, k.exp()).mT
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    difference = q[..., :, None, :] - k[..., None, :, :]
    match family:
        case "gaussian":
            return torch.exp(-difference.square().sum(-1) / (2 * s**2))
        case "laplacian":
            return torch.exp(-difference.abs().sum(-1) / (s * math.sqrt(q.shape[-1])))
        case "uniform":
            return torch.sinc(math.sqrt(3) * difference / s / math.pi).prod(-1)
    raise AssertionError(family)


def projected(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a module, with a key for each query head."""
    q, k, v = attention.queries_keys_values(x, 0) if hasattr(attention, "k_proj") else attention.projections(x, 0)
    assert (q.shape[1], k.shape[1], v.shape[1]) == (HEADS, KV_HEADS, KV_HEADS)
    return q, *(t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))


def output(attention: Any, mixed: Tensor) -> Tensor:
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


# --- the kernel


@each_direction
@pytest.mark.parametrize("family", RANDOM)
def test_error_to_the_exact_kernel_falls_as_the_square_root_of_the_features(family: str, causal: bool) -> None:
    width, seq, draws, s = 6, 8, 160, 1.25
    # Short vectors: the features of softmax have a variance that grows as the exponential of the squared lengths.
    q, k, v = some(1, 1, seq, width) / 3, some(1, 1, seq, width, seed=1) / 3, some(1, 1, seq, width, seed=2)
    exact = quadratic(exact_kernel(family, q, k, s), v, visible(None, 1, seq, causal))
    sizes, errors = (48, 192, 768, 3072), []
    for size in sizes:
        bandwidth = s if family in SHIFT_INVARIANT else None
        # Every head is a draw of its own.
        features = random_features(draws, width, seed=size, kernel=family, features=size, bandwidth=bandwidth)
        q_, k_, v_ = (t.expand(-1, draws, -1, -1) for t in (q, k, v))
        found = attend_by_features(features, q_, k_, v_, Context(causal), None)
        errors.append(float((found - exact).square().mean().sqrt()))
    x, y = torch.tensor(sizes).log2(), torch.tensor(errors).log2()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    # From 160 draws the error of each size is known to some percent, and the slope over six octaves to about 0.02.
    assert slope == pytest.approx(-0.5, abs=0.07)
    assert errors[-1] < 0.06 * float(v.std())


@each_direction
@each_type
@each_family
def test_module_tends_to_its_exact_kernel(type: str, family: str, causal: bool) -> None:
    keys = {} if family == "linear" else {"features": 8192}
    attention = build(type, kernel=family, **keys, **{"bandwidth": 2.0} if family == "uniform" else {})
    for part in attention.modules():
        if isinstance(part, nn.RMSNorm):
            part.weight.data *= 0.5  # short vectors, as above
    x, segments = 0.5 * some(2, 14, D_MODEL), documents(2, 14)
    q, k, v = projected(attention, x)
    weights = exact_kernel(family, q, k, 2.0 if family == "uniform" else 1.0)
    expected = output(attention, quadratic(weights, v, visible(segments, 2, 14, causal))).detach()
    error = attention(x, Context(causal, segments)).detach() - expected
    assert float(error.square().mean().sqrt() / expected.std()) < (1e-12 if family == "linear" else 0.04)


def test_bandwidth_and_family_change_the_kernel() -> None:
    x = some(1, 9, D_MODEL)
    outputs = [
        build("kernel", kernel=family, bandwidth=s)(x, Context()) for family in SHIFT_INVARIANT for s in (1.0, 2.0)
    ]
    outputs += [build("kernel", kernel=family)(x, Context()) for family in ("softmax", "linear")]
    assert all(float((a - b).detach().abs().max()) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])
    default = build("kernel")(x, Context())
    assert torch.equal(default, outputs[-2])  # softmax
    assert torch.equal(default, build("kernel", features=2 * D_MODEL // HEADS)(x, Context()))


def test_frequencies_of_softmax_are_orthogonal_and_as_long_as_normal_ones() -> None:
    w = random_features(3, 8, features=2 * 200).frequencies.value.float()
    assert w.shape == (3, 200, 8)
    block = F.normalize(w[:, 8:16], dim=-1)
    torch.testing.assert_close(block @ block.mT, torch.eye(8).expand(3, 8, 8), rtol=0, atol=1e-5)
    squares = w.square().sum(-1)  # chi-squared of 8 degrees
    assert float(squares.mean()) == pytest.approx(8, rel=0.06)
    assert float(squares.var()) == pytest.approx(16, rel=0.25)
    assert float(w.mean()) == pytest.approx(0, abs=0.06)


# --- sums in linear time


@each_direction
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
def test_chunked_sums_are_the_masked_quadratic_form(chunk: int, segmented: bool, groups: int, causal: bool) -> None:
    batch, heads, seq, size = 3, 2, 37, 5
    segments = documents(batch, seq) if segmented else None
    q, k, v = (
        some(batch, h, seq, d, seed=d).abs().requires_grad_()
        for h, d in ((groups * heads, size), (heads, size), (heads, 4))
    )
    weights = q @ k.repeat_interleave(groups, 1).mT
    expected = quadratic(weights, v.repeat_interleave(groups, 1), visible(segments, batch, seq, causal))
    found = linear_attention(q, k, v, Context(causal, segments), least=0.0, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = some(*expected.shape, seed=9)
    gradients = (torch.autograd.grad((x * direction).sum(), (q, k, v)) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@each_direction
def test_equal_numbers_that_do_not_touch_are_different_segments(causal: bool) -> None:
    q, k, v = (some(1, 1, 12, 3, seed=i).abs() for i in range(3))
    apart, numbered = (
        torch.tensor([[7, 7, 7, 0, 0, 7, 7, 7, 7, 7, -1, -1]]),
        torch.tensor([[0] * 3 + [1] * 2 + [2] * 5 + [3] * 2]),
    )
    outputs = (linear_attention(q, k, v, Context(causal, s), least=0.0, chunk=4) for s in (apart, numbered))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@each_direction
@pytest.mark.parametrize("segmented", [False, True])
@each_type
def test_saved_memory_is_linear_in_seq(type: str, segmented: bool, causal: bool) -> None:
    attention = build(type, kernel="gaussian")

    def saved(seq: int) -> int:
        held: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x
            return x

        x = some(1, seq, D_MODEL, seed=seq).requires_grad_()
        context = Context(causal, documents(1, seq) if segmented else None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attention(x, context)
        assert not any(t.shape[-2:] == (seq, seq) for t in held.values())
        assert out.shape == x.shape
        return sum(x.untyped_storage().nbytes() for x in held.values())

    assert saved(16 * CHUNK) < 4.1 * saved(4 * CHUNK)


@each_direction
@pytest.mark.parametrize("segmented", [False, True])
@each_family
def test_gradients(family: str, segmented: bool, causal: bool) -> None:
    features = random_features(1, 3, seed=3, kernel=family, features=None if family == "linear" else 6)
    segments = torch.tensor([[0] * 2 + [1] * 4 + [2], [4] * 6 + [5]]) if segmented else None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = Context(causal, segments)
        return linear_attention(features.queries(q), features.keys(k), v, context, least=features.least, chunk=2)

    inputs = tuple(some(2, h, 7, 3, seed=i).requires_grad_() for i, h in enumerate((2, 1, 1)))
    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


@each_type
def test_gradients_of_the_module(type: str) -> None:
    attention = build(type, kernel="softmax")
    x = some(1, 5, D_MODEL).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, Context(True, torch.tensor([[0, 0, 1, 1, 1]]))), x)


# --- who sees whom


@each_type
@each_family
def test_no_position_sees_the_future(type: str, family: str) -> None:
    attention, seq = build(type, kernel=family), CHUNK + 9
    x = some(1, seq, D_MODEL)
    before = attention(x, Context(causal=True))
    for p in (1, CHUNK - 1, CHUNK, seq - 1):
        changed = x.clone()
        changed[:, p] += 30 * some(D_MODEL, seed=p)
        after = attention(changed, Context(causal=True))
        torch.testing.assert_close(after[:, :p], before[:, :p], rtol=0, atol=1e-12)
        assert float((after - before)[:, p:].detach().abs().amax(-1).min()) > 1e-6


@each_direction
@each_type
@each_family
def test_no_position_sees_another_segment(type: str, family: str, causal: bool) -> None:
    attention, seq = build(type, kernel=family), 2 * CHUNK + 21
    x = some(1, seq, D_MODEL)
    segments = torch.zeros(1, seq, dtype=torch.int64)
    segments[:, 10:] = 1
    segments[:, CHUNK + 5 :] = 2  # goes on through two chunks
    segments[:, -4:] = -1
    context = Context(causal, segments)
    before = attention(x, context)
    for number in segments.unique():
        inside = segments[0] == number
        changed = x.clone()
        changed[:, inside] += 30 * some(int(inside.sum()), D_MODEL, seed=5)
        after = attention(changed, context)
        torch.testing.assert_close(after[:, ~inside], before[:, ~inside], rtol=0, atol=1e-12)
        assert float((after - before)[:, inside].detach().abs().amax(-1).min()) > 1e-6


# --- decoding


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("prefill", [1, 5, CHUNK + 3])
@each_type
@each_family
def test_decoding_is_one_causal_pass(type: str, family: str, prefill: int, segmented: bool) -> None:
    attention, batch, seq = build(type, kernel=family), 2, prefill + 18
    x = some(batch, seq, D_MODEL)
    segments = documents(batch, seq) if segmented else None
    with torch.no_grad():
        expected = attention(x, Context(True, segments))
        cache = attention.new_cache(batch, 1, torch.device("cpu"), x.dtype)
        empty, parts = cache.bytes(), []
        # then a few at once, then one by one
        bounds = [0, prefill, prefill + 3, *range(prefill + 4, seq + 1)]
        for begin, end in pairwise(bounds):
            so_far = None if segments is None else segments[:, :end]
            parts.append(attention(x[:, begin:end], Context(True, so_far), cache))
            assert cache.length == end
            assert cache.bytes() == empty  # however much it has seen
            assert cache.sums.untyped_storage().nbytes() + cache.counts.untyped_storage().nbytes() == empty
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-10)


@each_type
def test_cache_is_fp32_at_least_and_small(type: str) -> None:
    attention = build_attention(model_of(type, kernel="gaussian", features=10)).bfloat16()
    initialize(attention, name="attention", seed=0)
    cache: Any = attention.new_cache(3, 100_000, torch.device("cpu"), torch.bfloat16)  # type: ignore[operator]
    v_dim = 6 if type == "mlgka" else D_MODEL // HEADS
    assert cache.bytes() == 3 * KV_HEADS * 10 * (v_dim + 1) * 4 + 3 * 8
    out = attention(some(3, 2, D_MODEL).bfloat16(), Context(causal=True), cache)
    assert out.dtype == torch.bfloat16
    assert cache.sums.dtype == torch.float32


# --- the draw


def windows(type: str, seed: int = 0, **keys: Any) -> Window:
    rack = Rack(RackShape.of(model_of(type, **keys), (1, 1), vocab_size=11))
    for name, part in rack.named_children():
        initialize(part, name=name, seed=seed)
    return Window.of(rack)


def draws(module: nn.Module) -> list[Tensor]:
    return [part.frequencies.value.clone() for part in module.modules() if hasattr(part, "frequencies")]  # type: ignore[union-attr, operator]


def same(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@each_type
@pytest.mark.parametrize("family", RANDOM)
def test_draw_is_a_function_of_the_seed_and_only_that_is_stored(type: str, family: str) -> None:
    one, again, other = (windows(type, seed, kernel=family) for seed in (0, 0, 1))
    assert same(draws(one), draws(again)) == [True, True]
    assert same(draws(one), draws(other)) == [False, False]
    first, second = draws(one)
    assert not torch.equal(first, second)  # blocks
    assert not torch.equal(first[0], first[1])  # heads
    state = one.state_dict()
    stored = [name for name in state if "features" in name]
    assert stored == [f"stacks.{k}.blocks.0.attention.features.frequencies.seed" for k in range(2)]
    assert not any("features" in name for name, _ in one.named_parameters())
    other.load_state_dict(state)
    assert same(draws(one), draws(other)) == [True, True]
    tokens = torch.arange(7)[None]
    assert torch.equal(one(tokens, Context()), other(tokens, Context()))


@each_type
def test_draw_comes_back_in_a_rack_without_memory(type: str) -> None:
    rack = Rack(RackShape.of(model_of(type, kernel="softmax"), (1,), vocab_size=11))
    for name, part in rack.named_children():
        initialize(part, name=name, seed=0)
    loaded = empty_rack(rack.shape)
    loaded.load_state_dict(rack.state_dict(), assign=True)
    tokens = torch.arange(7)[None]
    assert torch.equal(rack(tokens), loaded(tokens))


@each_type
def test_redraw_changes_the_features_at_its_step_and_a_resumed_run_sees_the_same(type: str) -> None:
    window = windows(type, kernel="gaussian", redraw=3)
    seen = []
    for step in range(8):
        window.begin_step(step)
        seen.append(draws(window))
    changes = [not all(same(a, b)) for a, b in pairwise(seen)]
    assert changes == [False, False, True, False, False, True, False]
    assert same(seen[0], draws(windows(type, kernel="gaussian"))) == [True, True]
    for step in (2, 4, 7):
        resumed = windows(type, kernel="gaussian", redraw=3)
        resumed.begin_step(step)
        assert same(draws(resumed), seen[step]) == [True, True]
    still = windows(type, kernel="gaussian")
    still.begin_step(100)
    assert same(draws(still), seen[0]) == [True, True]


# --- safety

EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "small": lambda x: x * 1e-12,
    "large": lambda x: x * 1e3,
    "equal": lambda x: x[:, :1].expand_as(x).clone(),
    "opposite": lambda x: x[:, :1] * 100 * (torch.arange(x.shape[1]) % 2 * 2 - 1)[None, :, None],
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("extreme", EXTREMES)
@each_direction
@each_type
@each_family
def test_extreme_inputs_give_finite_outputs_and_gradients(
    type: str, family: str, causal: bool, extreme: str, autocast: bool
) -> None:
    attention = build(type, kernel=family, **{"qk_norm": False} if type == "kernel" else {}).float()
    x = EXTREMES[extreme](some(2, CHUNK + 3, D_MODEL).float()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(x, Context(causal, documents(2, CHUNK + 3)))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert x.grad is not None
    for tensor in (x.grad, *(p.grad for p in attention.parameters())):
        assert tensor.isfinite().all()


@each_direction
@pytest.mark.parametrize("scale", [1.0, 100.0])
@each_family
def test_heads_of_extreme_length(family: str, scale: float, causal: bool) -> None:
    features = random_features(2, 64, kernel=family).float()
    q, k, v = ((scale * some(1, 2, CHUNK + 9, 64, seed=i)).float().requires_grad_() for i in range(3))
    out = attend_by_features(features, q, k, v, Context(causal), None)
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out.square().mean(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("family", SHIFT_INVARIANT)
def test_denominators_have_a_floor(family: str) -> None:
    # With one frequency the estimate of a kernel is anything from -1 to 1.
    features = random_features(50, 4, kernel=family, features=2)
    q, k, v = some(1, 50, 40, 4), some(1, 50, 40, 4, seed=1), some(1, 50, 40, 4, seed=2).sign()
    for context in (Context(causal=True), Context(), Context(True, torch.arange(40)[None] // 3)):
        out = attend_by_features(features, q, k, v, context, None)
        assert float(out.abs().max()) <= 1 / features.least
        if context.causal:
            assert float(out.abs().max()) > 3  # the estimates were that bad


@pytest.mark.parametrize("s", [0.2, 0.9, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("family", SHIFT_INVARIANT)
def test_floor_is_the_least_value_of_the_kernel(family: str, s: float) -> None:
    # The farthest in one norm, and in both, of all unit vectors.
    along, across = torch.eye(4, dtype=torch.float64)[:1], torch.ones(1, 4, dtype=torch.float64)
    least = min(float(exact_kernel(family, q, -q, s)) for q in (along, across))
    for seed in range(50):
        assert float(exact_kernel(family, some(1, 4, seed=seed), some(1, 4, seed=99), s)) >= least or least < 0.01
    assert random_features(1, 4, kernel=family, bandwidth=s).least == pytest.approx(max(0.01, least))


@each_type
@each_family
def test_features_are_fp32_under_autocast(type: str, family: str) -> None:
    attention = build(type, kernel=family).float()
    seen: list[torch.dtype] = []

    def watched(original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def features_of(x: Tensor) -> Tensor:
            result = original(x)
            seen.extend((x.dtype, result.dtype))
            return result

        return features_of

    for name in ("queries", "keys"):
        setattr(attention.features, name, watched(getattr(attention.features, name)))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(some(1, 5, D_MODEL).float(), Context())
    assert out.dtype == torch.bfloat16
    assert seen == [torch.float32] * len(seen)
    assert len(seen) >= 4


# --- parameters


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"type": "kernel", "kernel": "linear", "features": 8}, "features"),
        ({"type": "kernel", "kernel": "linear", "redraw": 8}, "redraw"),
        ({"type": "kernel", "features": 7}, "features"),
        ({"type": "kernel", "bandwidth": 2.0}, "bandwidth"),
        ({"type": "standard", "bandwidth": 2.0}, "bandwidth"),
        ({"type": "kernel", "dropout": 0.1}, "dropout"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], path: str) -> None:
    assert [key for key, _ in AttentionParams(**keys).problems()] == [path]
