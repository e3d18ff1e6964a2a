"""The mixture of experts: what a token gets, the balance loss, gradients, experts that get nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.growth.init import initialize
from stackwise.growth.window import Batch, Window
from stackwise.mlp import moe
from stackwise.mlp.moe import MixtureOfExperts, load_imbalance
from stackwise.mlp.swiglu import SwiGLU
from stackwise.model.frozen import FrozenLinear
from stackwise.model.rack import Rack, RackShape
from stackwise.objectives.targets import Targets

D_MODEL, HIDDEN, EXPERTS = 16, 12, 4
BATCH, SEQ = 3, 10


def model_of(**params: Any) -> ModelParams:
    mlp = MLPParams(type="moe", hidden=HIDDEN, **{"n_experts": EXPERTS, **params})
    assert not mlp.problems()
    return ModelParams(d_model=D_MODEL, attention=AttentionParams(n_heads=2), mlp=mlp)


def build(**params: Any) -> MixtureOfExperts:
    mixture = MixtureOfExperts(model_of(**params)).double()
    initialize(mixture, name="mlp", seed=0)
    return mixture


def some_inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, SEQ, D_MODEL, generator=generator, dtype=torch.float64)


def send_all_to(mixture: MixtureOfExperts, experts: list[int]) -> Tensor:
    """Set the router so that the inputs that are returned go to `experts`, the first most."""
    with torch.no_grad():
        mixture.router.weight.zero_()
        for rank, expert in enumerate(experts):
            mixture.router.weight[expert, 0] = 3.0 - rank
    x = some_inputs()
    x[..., 0] = 1.0
    return x


def by_hand(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """The same, token by token."""
    out = torch.zeros_like(x)
    for i, j in torch.cartesian_prod(torch.arange(BATCH), torch.arange(SEQ)).tolist():
        probabilities = mixture.router(x[i, j]).softmax(-1)
        best = probabilities.argsort(descending=True)[: mixture.top_k].tolist()
        total = probabilities[best].sum() if mixture.top_k > 1 else 1.0
        for expert in best:
            out[i, j] += probabilities[expert] / total * mixture.experts[expert](x[i, j])
        for shared in mixture.shared:
            out[i, j] += shared(x[i, j])
    return out


# --- what a token gets


@pytest.mark.parametrize(("top_k", "n_shared"), [(1, 0), (2, 0), (3, 2), (4, 1)])
def test_tokens_get_their_experts_weighted_and_the_shared_ones(top_k: int, n_shared: int) -> None:
    mixture, x = build(top_k=top_k, n_shared=n_shared), some_inputs()
    with torch.no_grad():
        chosen = mixture.router(x).argmax(-1)
        assert len(chosen.unique()) == EXPERTS  # the test routes to all of them
        torch.testing.assert_close(mixture(x), by_hand(mixture, x), rtol=0, atol=1e-12)


def test_all_experts_are_the_dense_weighted_sum() -> None:
    mixture, x = build(top_k=EXPERTS), some_inputs()
    weights = mixture.router(x).softmax(-1)
    outputs = torch.stack([expert(x) for expert in mixture.experts], dim=-1)
    torch.testing.assert_close(mixture(x), (outputs * weights[..., None, :]).sum(-1), rtol=0, atol=1e-12)


def test_weights_of_the_chosen_are_renormalised() -> None:
    """Experts that are all the same make a mixture that is one of them, whatever the router says."""
    mixture, x = build(top_k=2), some_inputs()
    for expert in mixture.experts:
        expert.load_state_dict(mixture.experts[0].state_dict())
    torch.testing.assert_close(mixture(x), mixture.experts[0](x), rtol=0, atol=1e-12)


def test_no_expert_computes_what_is_not_its_own() -> None:
    mixture, x = build(top_k=2), some_inputs()
    seen = []
    for expert in mixture.experts:
        expert.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    mixture(x)
    assert sum(seen) == 2 * BATCH * SEQ
    assert seen == torch.bincount(mixture.router(x).topk(2).indices.flatten(), minlength=EXPERTS).tolist()


def test_tokens_do_not_affect_each_other() -> None:
    mixture, x = build(), some_inputs()
    with torch.no_grad():
        together = mixture(x)
        for i in range(BATCH):
            alone = torch.cat([mixture(x[i : i + 1, j : j + 1]) for j in range(SEQ)], dim=1)
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)


# --- balance


def test_balance_loss_of_a_case_by_hand() -> None:
    """Three tokens, two experts: shares 2/3 and 1/3, mean probabilities 0.6 and 0.4."""
    probabilities = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]])
    loss = load_imbalance(probabilities, torch.tensor([2, 1]))
    assert float(loss) == pytest.approx(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))


def test_balance_loss_runs_from_1_to_the_number_of_experts() -> None:
    even = torch.full((8, 4), 0.25)
    assert float(load_imbalance(even, torch.tensor([2, 2, 2, 2]))) == pytest.approx(1.0)
    one = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert float(load_imbalance(one, torch.tensor([8, 0, 0, 0]))) == pytest.approx(4.0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_balanced_mixture_has_the_weight_as_its_loss(top_k: int) -> None:
    """Token i prefers the experts i, i + 1, ... in a circle: every expert is as probable and as loaded as any other."""
    mixture = build(top_k=top_k, balance_weight=0.3).train()
    with torch.no_grad():
        mixture.router.weight.copy_(torch.eye(EXPERTS, D_MODEL))
    x = torch.zeros(1, EXPERTS, D_MODEL, dtype=torch.float64)
    for i in range(EXPERTS):
        x[0, i, :EXPERTS] = -torch.arange(EXPERTS).roll(i)
    mixture(x)
    assert mixture.balance_loss is not None
    assert mixture.balance_loss.item() == pytest.approx(0.3)
    mixture(send_all_to(mixture, [2]))
    # all tokens to some of the experts; if those are all there are, the load is even whatever the router says
    assert (mixture.balance_loss.item() > 0.31) == (top_k < EXPERTS)


def test_balance_loss_is_of_training_with_a_router_that_trains() -> None:
    mixture, x = build(), some_inputs()
    mixture.train()(x)
    assert mixture.balance_loss is not None
    mixture.eval()(x)
    assert mixture.balance_loss is None
    mixture.train().requires_grad_(False)(x)
    assert mixture.balance_loss is None


def test_balance_loss_evens_the_load() -> None:
    mixture = build(balance_weight=1.0, top_k=1).train()
    x = some_inputs() + 1.0
    optimizer = torch.optim.SGD(mixture.router.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        mixture(x)
        assert mixture.balance_loss is not None
        mixture.balance_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(mixture.balance_loss.detach()))
    assert losses[0] > 1.2
    assert losses[-1] < 1.05


def test_a_window_adds_the_balance_losses_of_its_blocks() -> None:
    def loss_of(weight: float) -> Tensor:
        rack = Rack(RackShape.of(model_of(balance_weight=weight), (2,), 19))
        for part, module in rack.named_children():
            initialize(module, name=part, seed=0)
        window = Window.of(rack).train()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 19, (BATCH, SEQ), generator=generator)
        positions = torch.arange(BATCH * SEQ)
        targets = Targets(positions, tokens.flatten(), torch.ones(BATCH * SEQ), BATCH * SEQ)
        loss = window.loss(Batch(tokens, targets), device=torch.device("cpu"), causal=False)
        balances = [m.balance_loss for m in window.modules() if isinstance(m, MixtureOfExperts)]
        assert len(balances) == 2
        return torch.stack([loss, *(b for b in balances if b is not None)])

    without, with_it = loss_of(0.0), loss_of(0.5)
    assert not without[1:].any()
    assert with_it[1:].min() > 0.5
    torch.testing.assert_close(with_it[0], without[0] + with_it[1:].sum())


# --- gradients


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_reach_router_experts_and_input(top_k: int) -> None:
    mixture, x = build(top_k=top_k, n_shared=1, balance_weight=0.0), some_inputs().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((by_hand_sum(mixture, x) * direction).sum(), [x, *mixture.parameters()])
    found = torch.autograd.grad((mixture(x) * direction).sum(), [x, *mixture.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def by_hand_sum(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """All experts on all tokens, weighted by zero where a token does not go."""
    probabilities = mixture.router(x).softmax(-1)
    best = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(mixture.top_k).indices, 1.0)
    weights = probabilities * best
    if mixture.top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    outputs = torch.stack([expert(x) for expert in mixture.experts], dim=-1)
    return (outputs * weights[..., None, :]).sum(-1) + sum(shared(x) for shared in mixture.shared)


@pytest.mark.parametrize("copies", [1, 3])
def test_gradient_of_taking_rows(copies: int) -> None:
    order = torch.randperm(5 * copies, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: moe._Take.apply(r, order, order.argsort(), copies), (rows,))
    assert torch.equal(moe._Take.apply(rows, order, order.argsort(), copies), rows[order // copies])


def test_a_repetition_has_the_same_bits() -> None:
    def once() -> list[Tensor]:
        mixture = build(top_k=3, n_shared=1).float()
        x = some_inputs().float().requires_grad_()
        out = mixture.train()(x)
        (out.square().sum() + (mixture.balance_loss or 0)).backward()
        return [out, *(p.grad for p in (x, *mixture.parameters()) if p.grad is not None)]

    first, second = once(), once()
    assert len(first) == 2 + len(list(build(n_shared=1).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- experts that get nothing, formats, frozen features


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_without_a_token_have_gradients_of_zero(dtype: torch.dtype) -> None:
    mixture = build(top_k=2).train()
    x = send_all_to(mixture, [3, 1])
    mixture.to(dtype)
    mixture(x.to(dtype)).square().sum().backward()
    for i, expert in enumerate(mixture.experts):
        grads = [p.grad for p in expert.parameters()]
        assert all(g is not None and bool(g.any()) == (i in (1, 3)) for g in grads)
    mixture.zero_grad()
    mixture(x[:, :0].to(dtype))  # nor does it mind no tokens at all


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_changes_no_more_than_rounding(autocast: bool) -> None:
    mixture = build(n_shared=1).float().train()
    x = send_all_to(mixture, [3, 1]).float()
    exact = mixture(x).detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = mixture(x)
        assert mixture.balance_loss is not None
        assert mixture.balance_loss.dtype == torch.float32
        (rounded.float().square().mean() + mixture.balance_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixture.parameters())
    error = float((rounded - exact).detach().norm() / exact.norm())
    assert (error > 0) == autocast
    assert error < 0.02


def test_frozen_up_is_of_every_expert_its_own() -> None:
    mixture, x = build(frozen_up=True, n_shared=1), some_inputs()
    assert {name for name, _ in mixture.named_parameters()} == {
        "router.weight",
        *(f"experts.{i}.down_proj.weight" for i in range(EXPERTS)),
        "shared.0.down_proj.weight",
    }
    features = [m.value for m in mixture.modules() if isinstance(m, FrozenLinear)]
    assert len({f.numpy().tobytes() for f in features}) == 2 * (EXPERTS + 1)
    torch.testing.assert_close(mixture(x), by_hand(mixture, x), rtol=0, atol=1e-12)
    again = MixtureOfExperts(model_of(frozen_up=True, n_shared=1)).double()
    again.load_state_dict(mixture.state_dict())
    assert torch.equal(again(x), mixture(x))


@pytest.mark.parametrize("n_shared", [0, 2])
def test_zero_output_projections_make_the_mixture_zero(n_shared: int) -> None:
    """What the initialisation `zero` of a new stack relies on."""
    mixture = build(n_shared=n_shared)
    projections = [p for name, p in mixture.named_parameters() if name.endswith("down_proj.weight")]
    assert len(projections) == EXPERTS + n_shared
    with torch.no_grad():
        for projection in projections:
            projection.zero_()
        assert not mixture(some_inputs()).any()


def test_experts_are_swiglu_and_start_different() -> None:
    mixture = build()
    assert all(isinstance(expert, SwiGLU) for expert in mixture.experts)
    assert len({p.detach().numpy().tobytes() for p in mixture.parameters()}) == 3 * EXPERTS + 1
