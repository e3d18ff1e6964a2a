"""What lowers the memory of training, and what training can do besides: none of it changes what it should not."""

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from stackwise.config.model import AttentionParams, MLPParams, ModelParams, TimeParams
from stackwise.config.training import OptimizerParams
from stackwise.errors import UserError
from stackwise.growth.init import initialize
from stackwise.growth.window import Batch, Window
from stackwise.model.context import Context
from stackwise.model.rack import Rack, RackShape
from stackwise.model.stack import Block, Stack
from stackwise.model.time import Modulation
from stackwise.objectives.targets import masked_targets
from stackwise.precision.dtypes import autocast
from stackwise.training import loop, quantized_adamw
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Best, EarlyStopping, Run, train
from stackwise.training.optimizer import build_optimizer, updates_in_backward
from stackwise.training.quantized_adamw import BLOCK, LEAST

CPU = torch.device("cpu")
D_MODEL, VOCAB, SEQ, BATCH, STEPS = 64, 70, 12, 4, 6
"""Matrices have `LEAST` elements at least."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {"attention": AttentionParams(n_heads=4, dropout=0.3)},
    "gqa": {"attention": AttentionParams(type="gqa", n_heads=4, n_kv_heads=2, dropout=0.3)},
    "mla": {"attention": AttentionParams(type="mla", n_heads=4, mla_rq=10, mla_rkv=12, dropout=0.3)},
    "kernel": {"attention": AttentionParams(type="kernel", n_heads=4)},
    "mlgka": {"attention": AttentionParams(type="mlgka", n_heads=4, n_kv_heads=2, mla_rkv=12)},
    "moe": {"mlp": MLPParams(type="moe", hidden=64, n_experts=3, n_shared=1, balance_weight=0.5)},
    "frozen-up": {"mlp": MLPParams(hidden=64, frozen_up=True)},
    "timed": {"time": TimeParams(mode="input", width=16)},
    "tied": {"tie_embeddings": True},
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def new_window(architecture: str = "standard", *, checkpointing: bool = False) -> Window:
    settings = {"attention": AttentionParams(n_heads=4), "mlp": MLPParams(hidden=64), **ARCHITECTURES[architecture]}
    rack = Rack(RackShape.of(ModelParams(d_model=D_MODEL, **settings), (2, 1), VOCAB))
    for name, part in rack.named_children():
        initialize(part, name=name, seed=0)
    for part in rack.modules():
        if isinstance(part, Modulation):  # they begin at zero
            nn.init.normal_(part.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return Window.of(rack, checkpointing=checkpointing)


def batches(step: int, *, parts: int = 1) -> list[Batch]:
    found = []
    for i in range(parts):
        generator = torch.Generator().manual_seed(parts * step + i)
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        masked = torch.rand(BATCH, SEQ, generator=generator) < 0.5
        targets = masked_targets(tokens.numpy(), masked.numpy(), torch.ones(BATCH).numpy())
        inputs = tokens.masked_fill(masked, VOCAB)
        found.append(Batch(inputs, targets, torch.full((BATCH,), 0.5), torch.arange(SEQ).expand(BATCH, SEQ) // 5))
    return found


class Log:
    """A watcher that interrupts training after some step."""

    def __init__(self, until: int | None = None) -> None:
        self.resumed_from: list[int] = []
        self._until = until

    def resumed(self, step: int) -> None:
        self.resumed_from.append(step)

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        pass

    def begin_step(self, step: int) -> None:
        if step == self._until:
            raise KeyboardInterrupt


def run(
    directory: Path,
    window: Window,
    log: Log | None = None,
    *,
    optimizer: dict[str, Any] | None = None,
    begin_step: Callable[[int], None] = lambda step: None,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train it; returns its weights and the losses."""
    log = log or Log()

    def begin(step: int) -> None:
        log.begin_step(step)
        begin_step(step)

    options: dict[str, Any] = {"grad_clip": None, "warmup": 0.0, "schedule": "constant", **(optimizer or {})}
    defaults = {"steps": STEPS, "lr": 1e-2, "dtype": "fp32", "checkpoint_every": 1000, "batches": batches}
    losses = train(
        Run(
            module=window,
            loss=partial(window.loss, device=CPU, causal=False),
            optimizer=OptimizerParams(**options),
            device=CPU,
            checkpoints=Checkpoints(directory / "run.safetensors"),
            begin_step=begin,
            **{**defaults, **settings},
        ),
        log,
    )
    assert not window.training
    return {name: w.clone() for name, w in window.state_dict().items()}, losses


def interrupted(
    directory: Path, windows: Callable[[], Window], until: Sequence[int], **settings: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """The same, interrupted before some steps, with a checkpoint after every other step."""
    (directory / "run.safetensors").unlink(missing_ok=True)
    settings = {"checkpoint_every": 2, **settings}
    for step in until:
        with pytest.raises(KeyboardInterrupt):
            run(directory, windows(), Log(step), **settings)
    log = Log()
    found = run(directory, windows(), log, **settings)
    assert log.resumed_from
    return found


def same(a: tuple[dict[str, Tensor], list[float]], b: tuple[dict[str, Tensor], list[float]]) -> bool:
    (weights, losses), (others, other_losses) = a, b
    assert weights.keys() == others.keys()
    return losses == other_losses and all(torch.equal(weights[name], others[name]) for name in weights)


def gradients(window: Window, dtype: str = "fp32") -> dict[str, Tensor]:
    """Of a batch, with its loss."""
    torch.manual_seed(0)
    (batch,) = batches(0)
    with autocast(CPU, dtype):
        loss = window.train().loss(batch, device=CPU, causal=False)
    loss.backward()
    found = {name: p.grad for name, p in window.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def held_bytes(forward: Callable[[], Any]) -> int:
    """What a forward pass keeps for the backward pass, without the weights and its inputs."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not x.is_leaf:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(kept.values())


# --- activation checkpointing


@every_architecture
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradients(architecture: str, dtype: str) -> None:
    plain = gradients(new_window(architecture), dtype)
    checkpointed = gradients(new_window(architecture, checkpointing=True), dtype)
    assert len(plain) > 10
    assert equal(plain, checkpointed)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """Every pass through a block from now on."""
    found: list[Block] = []
    forward = Block.forward

    def counted(self: Block, *args: Any, **kwargs: Any) -> Tensor:
        found.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)
    return found


def test_checkpointing_keeps_less_and_computes_each_block_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, checkpointed = new_window(), new_window(checkpointing=True)
    (batch,) = batches(0)
    loss = [partial(window.loss, batch, device=CPU, causal=False) for window in (plain, checkpointed)]
    assert held_bytes(loss[1]) < 0.5 * held_bytes(loss[0])
    found = passes(monkeypatch)
    gradients(checkpointed)
    blocks = [block for stack in checkpointed.stacks for block in stack.blocks]  # type: ignore[union-attr]
    assert found == [*blocks, *reversed(blocks)]


def test_gradients_pass_through_frozen_stacks_that_are_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those above a stack that is added at the bottom."""
    found = []
    for checkpointing in (False, True):
        window = new_window("moe", checkpointing=checkpointing)
        window.stacks[1].requires_grad_(False).eval()
        x = torch.randn(2, SEQ, D_MODEL, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with monkeypatch.context() as patch:
            counted = passes(patch)
            window.stacks[1](x, Context()).square().sum().backward()
        assert len(counted) == 1 + checkpointing
        assert x.grad is not None
        found.append({"x": x.grad, **gradients(window)})
    assert equal(*found)


def test_nothing_is_checkpointed_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation and decoding, also if gradients are wanted of what has a decoding cache."""
    monkeypatch.setattr("stackwise.model.stack.checkpoint", None)
    stack = new_window(checkpointing=True).stacks[0].eval()
    assert isinstance(stack, Stack)
    x = torch.randn(1, 4, D_MODEL, requires_grad=True)
    with torch.no_grad():
        stack(x, Context())
    cache = stack.new_cache(1, 4, CPU, torch.float32)
    stack(x, Context(causal=True), cache=cache).sum().backward()
    assert cache[0].length == 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_checkpointed_mixture_has_one_balance_loss_a_pass(checkpointing: bool) -> None:
    """The one that the loss was made of: not that of the second pass, which would keep a block's activations."""
    window = new_window("moe", checkpointing=checkpointing).train()
    (batch,) = batches(0)
    loss = window.loss(batch, device=CPU, causal=False)
    mixtures = [part for part in window.modules() if hasattr(part, "balance_loss")]
    before = [part.balance_loss for part in mixtures]
    loss.backward()
    assert len(mixtures) == 3
    assert all(part.balance_loss is kept for part, kept in zip(mixtures, before, strict=True))


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_all_that_saves_memory_works_together(tmp_path: Path, state: str) -> None:
    settings: dict[str, Any] = {"optimizer": {"state": state}, "dtype": "bf16"}
    plain = run(tmp_path, new_window("moe"), **settings)
    settings["optimizer"]["in_backward"] = True
    assert same(run(tmp_path, new_window("moe", checkpointing=True), **settings), plain)
    assert same(interrupted(tmp_path, partial(new_window, "moe", checkpointing=True), [3, 5], **settings), plain)


# --- moments of 8 bits


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def optimized(
    parameters: dict[str, nn.Parameter], gradient: Callable[[int, nn.Parameter], Tensor], steps: int, **settings: Any
) -> torch.optim.Optimizer:
    optimizer = build_optimizer(parameters, OptimizerParams(**settings), 1e-2, {})
    for step in range(steps):
        for p in parameters.values():
            p.grad = gradient(step, p)
        optimizer.step()
    return optimizer


def noise(step: int, p: nn.Parameter) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) + 0.5


@pytest.mark.parametrize("shape", [(LEAST - 1,), (3, 1000), (LEAST,), (40, 150), (65, 256)])
def test_moments_of_8_bits_follow_adamw(shape: tuple[int, ...]) -> None:
    """The first update is AdamW's: moments are rounded only after it. Small parameters keep moments of fp32."""
    for steps in (1, 20):
        exact, coded = parameter(*shape), parameter(*shape)
        start = exact.detach().clone()
        optimized({"p": exact}, noise, steps)
        optimized({"p": coded}, noise, steps, state="int8")
        moved = (exact.detach() - start).norm()
        error = float((coded.detach() - exact.detach()).norm() / moved)
        assert error < (1e-5 if steps == 1 or exact.numel() < LEAST else 0.05)
        assert moved > 0.5 * steps * 1e-2 * 0.3 * math.sqrt(exact.numel())


def test_moments_of_8_bits_take_a_quarter() -> None:
    """Two bytes an element, and two scales for every `BLOCK`."""
    n = 100 * 250
    parameters = {"matrix": parameter(100, 250), "norm": parameter(64)}
    optimizer = optimized(parameters, noise, 1, state="int8")
    held = {
        name: {key: value.nbytes for key, value in optimizer.state[p].items() if key != "step"}
        for name, p in parameters.items()
    }
    assert sum(held["matrix"].values()) == 2 * (n + 4 * math.ceil(n / BLOCK))
    assert sum(held["norm"].values()) == 2 * 4 * 64
    exact = optimized(parameters, noise, 1).state[parameters["matrix"]]
    assert sum(held["matrix"].values()) < 0.26 * (exact["exp_avg"].nbytes + exact["exp_avg_sq"].nbytes)


def test_codes_of_moments_are_those_of_the_dynamic_tables() -> None:
    """Signed for the first moment, unsigned for the second, which has a bit more."""
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise

    p = parameter(40, 150)
    state = optimized({"p": p}, noise, 1, state="int8", beta1=0.9, beta2=0.95).state[p]
    gradient = noise(0, p).flatten()
    moments = {"exp_avg": (0.1 * gradient, True), "exp_avg_sq": (0.05 * gradient.square(), False)}
    for name, (moment, signed) in moments.items():
        table = create_dynamic_map(signed=signed)
        found = dequantize_blockwise(state[name], absmax=state[f"{name}_scale"], code=table, blocksize=BLOCK)
        assert torch.equal(found.signbit() & (found != 0), moment.signbit() & (found != 0))
        large = moment.abs() > 0.1 * moment.abs().max()
        errors = (found / moment - 1).abs()[large]
        assert float(errors.mean()) < (0.02 if signed else 0.01)


def test_a_matrix_is_updated_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Tensor]] = []
    for size in (2**20, 4 * BLOCK):
        monkeypatch.setattr(quantized_adamw, "_SLICE", size)
        matrix = parameter(33, 300)
        state = optimized({"p": matrix}, noise, 5, state="int8").state[matrix]
        found.append({"p": matrix, **state})
    assert equal(*found)


def test_what_has_no_gradient_at_first_has_moments_of_zero() -> None:
    """As rows of an embedding: no division by a scale of zero."""
    p = parameter(70, 64)
    still = p[20:].detach().clone()

    def gradient(step: int, p: nn.Parameter) -> Tensor:
        return noise(step, p) * (torch.arange(70) < 20)[:, None]

    optimized({"p": p}, gradient, 5, state="int8", weight_decay=0.0)
    assert p.isfinite().all()
    assert torch.equal(p[20:].detach(), still)


def test_weight_decay_with_moments_of_8_bits_is_that_of_adamw() -> None:
    """Of matrices, large and small; not of vectors."""
    parameters = {"matrix": parameter(70, 64), "small": parameter(3, 4), "norm": parameter(64)}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimized(parameters, lambda _, p: torch.zeros_like(p), 1, state="int8", weight_decay=0.5)
    for name, p in parameters.items():
        expected = before[name] * (1 - 0.5 * 1e-2 if p.ndim == 2 else 1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, msg=name)


def test_training_with_moments_of_8_bits_learns_as_well(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batches": lambda step: batches(step % 2), "steps": 25, "lr": 5e-3}
    _, exact = run(tmp_path, new_window(), **settings)
    _, coded = run(tmp_path, new_window(), optimizer={"state": "int8"}, **settings)
    assert coded != exact
    assert exact[-1] < 0.5 * exact[0]
    assert coded[-1] == pytest.approx(exact[-1], rel=0.1)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_every_optimizer_resumes_in_the_same_bits(tmp_path: Path, state: str, in_backward: bool) -> None:
    settings: dict[str, Any] = {"optimizer": {"state": state, "in_backward": in_backward}, "dtype": "bf16"}
    expected = run(tmp_path, new_window(), **settings)
    assert same(interrupted(tmp_path, new_window, [3, 5], **settings), expected)
    with safe_open(tmp_path / "run.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys() if key.startswith("exp_avg/")}  # noqa: SIM118
    assert (torch.uint8 in kinds) == (state == "int8")


# --- updates in the backward pass


@every_architecture
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_updates_in_the_backward_pass_are_the_same(tmp_path: Path, architecture: str, state: str) -> None:
    """Also of what is used twice: tied embeddings, a router with its balance loss."""
    settings: dict[str, Any] = {"state": state}
    plain = run(tmp_path, new_window(architecture), optimizer=settings, steps=3)
    found = run(tmp_path, new_window(architecture), optimizer={**settings, "in_backward": True}, steps=3)
    assert same(found, plain)


@pytest.mark.parametrize("in_backward", [False, True])
def test_gradients_are_dropped_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_backward: bool) -> None:
    together: list[int] = []

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)

        def note(*_: Any) -> None:
            members = [p for group in optimizer.param_groups for p in group["params"]]
            together.append(sum(p.grad is not None for p in members))

        optimizer.register_step_pre_hook(note)
        return optimizer

    monkeypatch.setattr(loop, "build_optimizer", watched)
    window = new_window()
    run(tmp_path, window, optimizer={"in_backward": in_backward}, steps=1)
    n = len(list(window.parameters()))
    assert together == ([1] * n + [0] if in_backward else [n])
    (batch,) = batches(0)
    before = {name: w.clone() for name, w in window.state_dict().items()}
    window.loss(batch, device=CPU, causal=False).backward()
    assert equal(before, window.state_dict())  # the hooks have gone
    assert all(p.grad is not None for p in window.parameters())


def test_hooks_go_when_training_fails() -> None:
    p = parameter(3)
    optimizer = build_optimizer({"p": p}, OptimizerParams(), 0.1, {})
    with pytest.raises(ArithmeticError), updates_in_backward([p], optimizer):
        raise ArithmeticError
    p.sum().backward()
    assert p.grad is not None


def test_updates_in_the_backward_pass_want_no_loss_scale(tmp_path: Path) -> None:
    message = r"optimizer\.in_backward = true: expected false with compute\.dtype fp16.*set compute\.dtype to bf16"
    with pytest.raises(UserError, match=message):
        run(tmp_path, new_window(), dtype="fp16", optimizer={"in_backward": True})


# --- learning rates of their own


def test_parameters_may_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    """The first update of AdamW is as large as the learning rate, whatever the gradient."""
    window = new_window()
    before = {name: p.detach().clone() for name, p in window.named_parameters()}
    own = {"head.projection.weight": 3e-2, "stacks.0.blocks.0.mlp_norm.weight": 5e-4}
    after, _ = run(tmp_path, window, lrs=own, lr=1e-3, steps=1, optimizer={"weight_decay": 0.0})
    for name, weight in before.items():
        assert float((after[name] - weight).abs().max()) == pytest.approx(own.get(name, 1e-3), rel=1e-2), name


def test_all_learning_rates_follow_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[dict[float, float]] = []

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        groups = optimizer.param_groups
        optimizer.register_step_pre_hook(lambda *_: used.append({g["peak_lr"]: g["lr"] for g in groups}))
        return optimizer

    monkeypatch.setattr(loop, "build_optimizer", watched)
    settings = {"schedule": "linear", "warmup": 0.5}
    run(tmp_path, new_window(), lrs={"head.projection.weight": 3e-2}, lr=1e-3, steps=4, optimizer=settings)
    shares = [0.5, 1.0, 1.0, 0.5]
    assert used == [pytest.approx({1e-3: 1e-3 * share, 3e-2: 3e-2 * share}) for share in shares]


def test_a_learning_rate_of_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"these do not train: \['head\.weight'\]"):
        run(tmp_path, new_window(), lrs={"head.weight": 1.0})


# --- parameters that learn later


def unfreezing(window: Window) -> Callable[[int], None]:
    """The lower stack learns from step 2 on, and not in step 4."""
    parameters = list(window.stacks[0].parameters())

    def begin_step(step: int) -> None:
        for p in parameters:
            p.requires_grad_(step >= 2 and step != 4)

    return begin_step


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_parameters_may_be_frozen_and_unfrozen(tmp_path: Path, state: str, in_backward: bool) -> None:
    """Interrupted while they are frozen, learn, and are frozen again."""
    settings: dict[str, Any] = {"optimizer": {"state": state, "in_backward": in_backward}}
    moved: list[bool] = []
    window = new_window()
    lower = next(window.stacks[0].parameters())
    values = [lower.detach().clone()]
    learn = unfreezing(window)

    def watched(step: int) -> None:
        learn(step)
        values.append(lower.detach().clone())

    expected = run(tmp_path, window, begin_step=watched, **settings)
    values.append(lower.detach().clone())
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(values[1:])]
    assert moved == [False, False, True, True, False, True]

    log_window = new_window()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, log_window, Log(2), begin_step=unfreezing(log_window), checkpoint_every=1, **settings)
    with safe_open(tmp_path / "run.safetensors", framework="pt") as file:
        stepped = {key.split("/", 1)[1] for key in file.keys() if key.startswith("step/")}  # noqa: SIM118
        there = {key.split("/", 1)[1] for key in file.keys() if key.startswith("parameter/")}  # noqa: SIM118
    assert there - stepped == {f"stacks.0.{name}" for name, _ in window.stacks[0].named_parameters()}

    for until in ([1], [3, 4], [5]):
        (tmp_path / "run.safetensors").unlink()
        for step in (*until, None):
            resumed, found = new_window(), None
            try:
                found = run(
                    tmp_path, resumed, Log(step), begin_step=unfreezing(resumed), checkpoint_every=1, **settings
                )
            except KeyboardInterrupt:
                assert step is not None
        assert found is not None
        assert same(found, expected)


# --- dropout


def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    expected = run(tmp_path, new_window())
    assert same(interrupted(tmp_path, new_window, [3, 5]), expected)
    (tmp_path / "run.safetensors").unlink()
    torch.manual_seed(7)  # the global generator has no part in it
    assert same(run(tmp_path, new_window()), expected)
    assert not same(run(tmp_path, new_window(), seed=1), expected)


# --- early stopping


class Validation:
    """Validation losses that are written down before, and what the weights were then."""

    def __init__(self, window: Window, losses: Mapping[int, float], every: int, patience: int) -> None:
        self.window, self.losses = window, losses
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.step = 0
        self.stopping = EarlyStopping(self.validate, every, patience)

    def begin_step(self, step: int) -> None:
        self.step = step + 1

    def validate(self) -> float:
        assert not self.window.training
        assert not torch.is_grad_enabled()
        self.seen[self.step] = {name: w.clone() for name, w in self.window.state_dict().items()}
        return self.losses[self.step]


def stopped(
    directory: Path, losses: Mapping[int, float], *, patience: int = 2, until: int | None = None, **settings: Any
) -> tuple[Validation, dict[str, Tensor], list[float]]:
    """Train with early stopping, validated every other step."""
    window = new_window()
    validation = Validation(window, losses, 2, patience)
    defaults = {"steps": 11, "stopping": validation.stopping, "begin_step": validation.begin_step}
    weights, curve = run(directory, window, Log(until), **{**defaults, **settings})
    return validation, weights, curve


@pytest.mark.parametrize(
    ("losses", "patience", "taken", "best"),
    [
        ([5, 4, 3, 2, 1, 0.5], 1, 11, 11),
        ([5, 4, 3, 2, 1, 1.5], 1, 11, 10),
        ([5, 4, 6, 7, 1, 1], 2, 8, 4),
        ([5, 4, 6, 3, 7, 8], 2, 11, 8),
        ([5, 4, 6, 3, 7, 8], 1, 6, 4),
        ([5, 5, 5, 1, 1, 1], 2, 6, 2),
        ([5, math.nan, math.nan, 1, 1, 1], 2, 6, 2),
        ([5, 6, 7, 8, 9, 9], 99, 11, 2),
    ],
)
def test_training_stops_when_validation_does_not_improve(
    tmp_path: Path, losses: list[float], patience: int, taken: int, best: int
) -> None:
    """With the weights that were best. The last step is validated too, though no other odd one is."""
    steps = (2, 4, 6, 8, 10, 11)
    validation, weights, curve = stopped(tmp_path, dict(zip(steps, losses, strict=True)), patience=patience)
    assert len(curve) == taken
    assert validation.stopping.best == Best(best, losses[steps.index(best)])
    assert [*validation.seen] == [step for step in steps if step <= taken]
    assert equal(weights, validation.seen[best])
    distinct = [step for step, seen in validation.seen.items() if equal(seen, weights)]
    assert distinct == [best]


def test_training_that_never_validates_well_keeps_its_last_weights(tmp_path: Path) -> None:
    validation, weights, curve = stopped(tmp_path, dict.fromkeys((2, 4), math.nan))
    assert len(curve) == 4
    assert validation.stopping.best == Best()
    assert equal(weights, validation.seen[4])


def test_validation_changes_nothing_in_training(tmp_path: Path) -> None:
    improving = dict(zip((2, 4, 6, 8, 10, 11), range(6, 0, -1), strict=True))
    _, weights, losses = stopped(tmp_path, improving)
    (tmp_path / "run.safetensors").unlink()
    assert same((weights, losses), run(tmp_path, new_window(), steps=11))


LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: 9.0, 12: 2.5}


@pytest.mark.parametrize("checkpoint_every", [1, 1000])
def test_early_stopping_resumes_in_the_same_bits(tmp_path: Path, checkpoint_every: int) -> None:
    """Interrupted before the best weights and after them, and when others had been the best until then."""
    settings: dict[str, Any] = {"checkpoint_every": checkpoint_every, "steps": 13}
    validation, weights, losses = stopped(tmp_path, LOSSES, **settings)
    assert len(losses) == 12
    assert equal(weights, validation.seen[8])
    for until in (1, 7, 11):
        (tmp_path / "run.safetensors").unlink()
        with pytest.raises(KeyboardInterrupt):
            stopped(tmp_path, LOSSES, until=until, **settings)
        resumed, again, again_losses = stopped(tmp_path, LOSSES, **settings)
        assert resumed.stopping.best == Best(8, 2.0)
        assert again_losses == losses
        assert equal(again, weights)
    # What a finished run has left makes it end in the same way once more.
    _, again, again_losses = stopped(tmp_path, LOSSES, **settings)
    assert again_losses == losses
    assert equal(again, weights)


def test_the_best_weights_are_kept_in_the_checkpoint_once(tmp_path: Path) -> None:
    """Not in memory; and not where those of the checkpoint itself are the best."""
    for until, twice in ((4, False), (5, True)):
        (tmp_path / "run.safetensors").unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            stopped(tmp_path, LOSSES, until=until, checkpoint_every=5)
        with safe_open(tmp_path / "run.safetensors", framework="pt") as file:
            assert any(key.startswith("best/") for key in file.keys()) == twice  # noqa: SIM118


def test_best_weights_that_have_gone_are_missed(tmp_path: Path) -> None:
    def lose(step: int) -> None:
        if step == 6:
            (tmp_path / "run.safetensors").write_bytes(b"junk")

    window = new_window()
    steps = iter((4, 2, 3, 4, 5))
    stopping = EarlyStopping(lambda: next(steps), 2, 2)
    with pytest.raises(UserError, match=r"run\.safetensors: went missing or was damaged while training.*run again"):
        run(tmp_path, window, steps=11, stopping=stopping, begin_step=lose)


def test_nothing_of_training_stays_in_memory(tmp_path: Path) -> None:
    window = new_window("moe", checkpointing=True)
    run(tmp_path, window, optimizer={"state": "int8", "in_backward": True})
    alive = weakref.ref(window)
    del window
    gc.collect()
    assert alive() is None
