"""The training loop: schedules, accumulation, clipping, decay, checkpoints, what each parameter does."""

import itertools
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from stackwise.config.compute import ComputeParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.training import OptimizerParams
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.errors import UserError
from stackwise.growth import tuning
from stackwise.growth.batches import TokenBatches
from stackwise.growth.init import initialize
from stackwise.growth.window import Batch, Window
from stackwise.model.context import Context
from stackwise.model.rack import Rack, RackShape
from stackwise.objectives.targets import MaskDiffusionObjective
from stackwise.training import loop
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.device import set_up
from stackwise.training.loop import Run, train
from stackwise.training.optimizer import build_optimizer, learning_rate_share
from tests.unit.growing import CPU, params_with

MODEL = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=24))
VOCAB, SEQ, SAMPLES = 23, 8, 10
STEPS, BATCH = 12, 4


def new_window(model: ModelParams = MODEL) -> Window:
    rack = Rack(RackShape.of(model, (1, 1), VOCAB))
    initialize(rack.embeddings, name="embeddings", seed=0)
    for k, stack in enumerate(rack.stacks):
        initialize(stack, name=f"stacks.{k}", seed=0)
    initialize(rack.head, name="head", seed=0)
    return Window.of(rack)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    """Text in which each token follows from the one before, so that there is something to learn."""
    np.save(tmp_path / "train.npy", (np.arange(SEQ * SAMPLES) % VOCAB).astype(np.uint16))
    return TokenDataset(tmp_path / "train.npy", SEQ)


def batches_of(dataset: TokenDataset, *, batch_size: int = BATCH, accumulate: int = 1) -> TokenBatches:
    order = SampleOrder(len(dataset), seed=0, stream="test")
    objective = MaskDiffusionObjective(ObjectiveParams(), seed=0, mask_id=VOCAB)
    return TokenBatches(dataset, order, objective, batch_size, accumulate)


class Log:
    """A watcher that remembers what it is told."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.resumed_from: list[int] = []
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.interrupt_at = interrupt_at

    def resumed(self, step: int) -> None:
        self.resumed_from.append(step)

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        assert waited >= 0
        self.steps.append(step)
        self.losses += losses
        if self.interrupt_at is not None and step >= self.interrupt_at:
            raise KeyboardInterrupt


class Setting:
    """One window and how to train it; every call of `run` starts from the initial weights."""

    def __init__(self, dataset: TokenDataset, directory: Path) -> None:
        self.dataset = dataset
        self.file = directory / "checkpoints" / "run.safetensors"

    def run(
        self,
        *,
        watcher: Log | None = None,
        dtype: str = "fp32",
        model: ModelParams = MODEL,
        window: Window | None = None,
        accumulate: int = 1,
        batches: Callable[[int], Sequence[Batch]] | None = None,
        optimizer: dict[str, Any] | None = None,
        steps: int = STEPS,
        lr: float = 1e-2,
        checkpoint_every: int = 1000,
        prefetch: int = 2,
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Weights and losses after training."""
        window = window or new_window(model)
        losses = train(
            Run(
                module=window,
                batches=batches or batches_of(self.dataset, accumulate=accumulate),
                loss=partial(window.loss, device=CPU, causal=False),
                steps=steps,
                lr=lr,
                optimizer=OptimizerParams(accumulate=accumulate, **(optimizer or {})),
                device=CPU,
                dtype=dtype,
                checkpoints=Checkpoints(self.file),
                checkpoint_every=checkpoint_every,
                prefetch=prefetch,
            ),
            watcher or Log(),
        )
        assert not window.training
        return {name: w.detach().clone() for name, w in window.state_dict().items()}, losses


@pytest.fixture
def setting(dataset: TokenDataset, tmp_path: Path) -> Setting:
    return Setting(dataset, tmp_path)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --- learning rate


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"schedule": "constant", "warmup": 0.2}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 0.0}, [1.0] * 10),
        ({"schedule": "constant", "warmup": 1.0}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (
            {"schedule": "linear", "warmup": 0.2, "final_lr": 0.2},
            [0.5, 1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
        ),
        ({"schedule": "linear", "warmup": 0.0}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (
            {"schedule": "cosine", "warmup": 0.2, "final_lr": 0.2},
            [0.5, 1.0, *(0.6 + 0.4 * math.cos(math.pi * i / 8) for i in range(8))],
        ),
        ({"schedule": "wsd", "warmup": 0.2, "decay": 0.3}, [0.5, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]),
        (
            {"schedule": "wsd", "warmup": 0.2, "decay": 0.5, "final_lr": 0.5},
            [0.5, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6],
        ),
        ({"schedule": "wsd", "warmup": 0.0, "decay": 0.01}, [1.0] * 10),
    ],
    ids=lambda value: "-".join(f"{v}" for v in value.values()) if isinstance(value, dict) else "",
)
def test_schedules(params: dict[str, Any], expected: list[float]) -> None:
    shares = [learning_rate_share(OptimizerParams(**params), step, 10) for step in range(10)]
    assert shares == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_short_runs_have_a_learning_rate_too(schedule: Any) -> None:
    for steps in (1, 2, 3):
        shares = [learning_rate_share(OptimizerParams(schedule=schedule), step, steps) for step in range(steps)]
        assert all(0 < share <= 1 for share in shares)


def test_loop_follows_the_schedule(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        return optimizer

    monkeypatch.setattr(loop, "build_optimizer", watched)
    params: dict[str, Any] = {"schedule": "cosine", "warmup": 0.25, "final_lr": 0.1}
    setting.run(optimizer=params, lr=0.02)
    shares = [learning_rate_share(OptimizerParams(**params), step, STEPS) for step in range(STEPS)]
    assert used == pytest.approx([0.02 * share for share in shares])


# --- gradients


def test_training_learns(setting: Setting) -> None:
    _, losses = setting.run(steps=60)
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(setting: Setting, parts: int) -> None:
    """Plain addition in another order: fp32 rounding, amplified a little by Adam's division, is all that differs."""
    whole, losses = setting.run(optimizer={"eps": 1e-4})
    cut, cut_losses = setting.run(accumulate=parts, optimizer={"eps": 1e-4})
    assert cut_losses == pytest.approx(losses, rel=1e-4)
    assert difference(whole, cut) < 1e-4
    assert difference(whole, setting.run(steps=1)[0]) > 1e-2


def test_accumulation_changes_no_targets(dataset: TokenDataset) -> None:
    for step in (0, 3, 7):
        (whole,) = batches_of(dataset)(step)
        parts = batches_of(dataset, accumulate=2)(step)
        assert len(parts) == 2
        assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)
        assert torch.equal(torch.cat([p.targets.tokens for p in parts]), whole.targets.tokens)
        assert torch.equal(torch.cat([p.targets.weights for p in parts]), whole.targets.weights)
        rows = torch.cat([p.targets.rows + i * BATCH // 2 * SEQ for i, p in enumerate(parts)])
        assert torch.equal(rows, whole.targets.rows)
        assert sum(p.targets.batch_tokens for p in parts) == whole.targets.batch_tokens == BATCH * SEQ


def gradient_norms(setting: Setting, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[float]:
    """Norm of the whole gradient that the optimizer sees in each step."""
    norms: list[float] = []

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)

        def note(*_: Any) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

        optimizer.register_step_pre_hook(note)
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_optimizer", watched)
        setting.run(steps=5, **options)
    return norms


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gradients_are_clipped(setting: Setting, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """To the norm of the true gradient: with fp16 the scale of the loss is taken out first."""
    free = gradient_norms(setting, monkeypatch, dtype=dtype, optimizer={"grad_clip": 1e6})
    assert min(free) > 0.2
    assert max(free) < 100
    clipped = gradient_norms(setting, monkeypatch, dtype=dtype, optimizer={"grad_clip": 0.1})
    assert clipped == pytest.approx([0.1] * 5, rel=1e-3)
    unclipped = gradient_norms(setting, monkeypatch, optimizer={"grad_clip": None})
    assert unclipped == pytest.approx(gradient_norms(setting, monkeypatch, optimizer={"grad_clip": 1e6}), rel=1e-3)


def test_weight_decay_shrinks_matrices_only() -> None:
    window = new_window()
    before = {name: p.detach().clone() for name, p in window.named_parameters()}
    optimizer = build_optimizer(dict(window.named_parameters()), OptimizerParams(weight_decay=0.5), 0.1, {})
    for p in window.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in window.named_parameters():
        expected = before[name] * (0.95 if p.ndim == 2 else 1.0)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, msg=name)
    assert {p.ndim for p in window.parameters()} == {1, 2}


def test_optimizer_leaves_out_what_is_frozen(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[list[nn.Parameter]] = []

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        held.append([p for group in optimizer.param_groups for p in group["params"]])
        return optimizer

    monkeypatch.setattr(loop, "build_optimizer", watched)
    window = new_window()
    window.stacks[0].requires_grad_(False)
    before = {name: w.clone() for name, w in window.state_dict().items()}
    after, _ = setting.run(window=window)
    assert {id(p) for p in held[0]} == {id(p) for p in window.parameters() if p.requires_grad}
    assert {name for name in after if torch.equal(after[name], before[name])} == {
        name for name in before if name.startswith("stacks.0.")
    }


def test_frozen_up_is_untouched_by_training(setting: Setting) -> None:
    model = MODEL.model_copy(update={"mlp": MLPParams(hidden=24, frozen_up=True)})
    before = new_window(model).state_dict()
    after, _ = setting.run(model=model)
    untouched = {name for name in after if torch.equal(after[name], before[name])}
    assert untouched == {f"stacks.{k}.blocks.0.mlp.{w}_proj.seed" for k in range(2) for w in ("gate", "up")}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_stacks_are_the_same_function(dataset: TokenDataset) -> None:
    """Forward and backward, and the names of the weights."""
    plain, compiled = new_window(), new_window()
    compiled.compile()
    (batch,) = batches_of(dataset)(0)
    losses = [window.loss(batch, device=CPU, causal=False) for window in (plain, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    theirs = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled


# --- checkpoints


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_interrupted_training_ends_in_the_same_bits(setting: Setting, dtype: str) -> None:
    """Interrupted twice, between checkpoints and on one, also right after a resumption."""
    options: dict[str, Any] = {"dtype": dtype, "checkpoint_every": 4, "accumulate": 2}
    uninterrupted, losses = setting.run(**{**options, "checkpoint_every": 1000})
    assert not setting.file.exists()

    def broken(step: int) -> list[Batch]:
        if step == 6:
            raise OSError("the disk is gone")
        return batches_of(setting.dataset, accumulate=2)(step)

    with pytest.raises(OSError, match="the disk is gone"):
        setting.run(batches=broken, **options)
    second = Log(interrupt_at=8)
    with pytest.raises(KeyboardInterrupt):
        setting.run(watcher=second, **options)
    assert second.resumed_from == [4]
    third = Log()
    weights, all_losses = setting.run(watcher=third, **options)
    # The interruption came with the news of step 8, before its checkpoint was written.
    assert third.resumed_from == [4]
    assert all_losses == losses
    assert third.losses == losses[4:]
    assert third.steps[-1] == STEPS
    assert same(weights, uninterrupted)


@pytest.mark.parametrize("at", [1, 5, 11])
def test_resumes_from_every_step(setting: Setting, at: int) -> None:
    uninterrupted, losses = setting.run()

    def broken(step: int) -> list[Batch]:
        if step == at:
            raise RuntimeError
        return batches_of(setting.dataset)(step)

    with pytest.raises(RuntimeError):
        setting.run(batches=broken, checkpoint_every=1)
    log = Log()
    weights, all_losses = setting.run(watcher=log, checkpoint_every=5)
    assert log.resumed_from == [at]
    assert all_losses == losses
    assert same(weights, uninterrupted)


def test_fp16_resumes_with_its_loss_scale(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that has been lowered by overflows stays lowered; overflowing steps change no weight."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    before = {name: w.clone() for name, w in new_window().state_dict().items()}
    options: dict[str, Any] = {"dtype": "fp16", "checkpoint_every": 4, "steps": 40}
    with pytest.raises(KeyboardInterrupt):
        setting.run(watcher=Log(interrupt_at=8), **options)
    with safe_open(setting.file, framework="pt") as f:
        facts = json.loads(f.metadata()["facts"])
        kept = {name: f.get_tensor(f"parameter/{name}") for name in before}
    assert facts["step"] == 4
    assert facts["scaler"]["scale"] == 2.0**36
    assert same(kept, before)
    resumed, losses = setting.run(**options)
    setting.file.unlink()
    uninterrupted, expected = setting.run(**{**options, "checkpoint_every": 1000})
    assert losses == expected
    assert same(resumed, uninterrupted)
    assert not same(resumed, before)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def other_header(content: bytes) -> bytes:
    return content.replace(b'parameter/head.norm.weight"', b'parameter/head.norn.weight"')


def other_facts(content: bytes) -> bytes:
    return content.replace(b'"facts":', b'"fakts":')


def not_json(content: bytes) -> bytes:
    return content.replace(b'{\\"step\\"', b'[\\"step\\"')


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [cut, lambda _: b"", lambda _: b"junk" * 1000, other_header, other_facts, not_json, lambda c: c + b"x", flipped],
)
def test_unreadable_checkpoint_starts_over(setting: Setting, damage: Callable[[bytes], bytes]) -> None:
    uninterrupted, losses = setting.run()
    with pytest.raises(KeyboardInterrupt):
        setting.run(watcher=Log(interrupt_at=8), checkpoint_every=4)
    whole = setting.file.read_bytes()
    setting.file.write_bytes(damage(whole))
    assert setting.file.read_bytes() != whole
    log = Log()
    weights, all_losses = setting.run(watcher=log)
    assert log.resumed_from == []
    assert all_losses == losses
    assert same(weights, uninterrupted)


def test_a_checkpoint_that_was_not_finished_is_not_seen(setting: Setting) -> None:
    setting.file.parent.mkdir(parents=True)
    setting.file.with_suffix(".partial").write_bytes(b"half of it")
    log = Log()
    setting.run(watcher=log, checkpoint_every=4)
    assert log.resumed_from == []
    assert [f.name for f in setting.file.parent.iterdir()] == [setting.file.name]
    Checkpoints(setting.file).discard()
    Checkpoints(setting.file).discard()
    assert list(setting.file.parent.iterdir()) == []


def test_checkpoints_and_loading_ahead_change_nothing(setting: Setting) -> None:
    plain = setting.run()
    changes: list[dict[str, Any]] = [{"checkpoint_every": 1}, {"prefetch": 1}, {"prefetch": 9}]
    for options in changes:
        setting.file.unlink(missing_ok=True)
        weights, losses = setting.run(**options)
        assert losses == plain[1]
        assert same(weights, plain[0])


def test_watcher_hears_of_every_step_once(setting: Setting) -> None:
    log = Log()
    _, losses = setting.run(watcher=log, steps=25, checkpoint_every=7)
    assert log.losses == losses
    assert log.steps == [7, 10, 14, 20, 21, 25]


# --- parameters


OPTIMIZER_CHANGES: list[dict[str, Any]] = [
    {"beta1": 0.5},
    {"beta2": 0.5},
    {"eps": 1e-2},
    {"weight_decay": 0.9},
    {"grad_clip": 0.01, "eps": 1e-2},
    {"grad_clip": None, "eps": 1e-2},
    {"schedule": "constant"},
    {"schedule": "linear"},
    {"schedule": "cosine"},
    {"warmup": 0.5},
    {"decay": 0.8},
    {"final_lr": 0.5},
]


@pytest.mark.parametrize("change", OPTIMIZER_CHANGES, ids=str)
def test_every_optimizer_parameter_acts(setting: Setting, change: dict[str, Any]) -> None:
    base = {"weight_decay": 0.1, **{key: value for key, value in change.items() if key == "eps" and len(change) > 1}}
    weights, _ = setting.run(optimizer=base)
    changed, _ = setting.run(optimizer={**base, **change})
    assert difference(weights, changed) > 1e-5


def test_no_optimizer_parameter_is_left_out() -> None:
    """`accumulate` has tests of its own above, what saves memory in another file."""
    tried = {"accumulate", "state", "in_backward", *itertools.chain(*OPTIMIZER_CHANGES)}
    assert tried == set(OptimizerParams.model_fields)


def test_compute_format_acts(setting: Setting) -> None:
    results = {dtype: setting.run(dtype=dtype)[0] for dtype in ("fp32", "bf16", "fp16")}
    assert all(weight.dtype == torch.float32 for weights in results.values() for weight in weights.values())
    assert difference(results["fp32"], results["bf16"]) > difference(results["fp32"], results["fp16"]) > 1e-5


def test_learning_rate_and_steps_act(setting: Setting) -> None:
    weights, losses = setting.run()
    assert difference(weights, setting.run(lr=2e-2)[0]) > 1e-3
    assert len(setting.run(steps=7)[1]) == 7 != len(losses)


@pytest.fixture
def _restored() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("_restored")
def test_set_up_does_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert set_up(ComputeParams(device="cpu", deterministic=False), threads=1, seed=3) == CPU
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    drawn = torch.rand(4)
    set_up(ComputeParams(device="cpu", deterministic=True), threads=2, seed=3)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("_restored")
def test_device_is_the_best_there_is_or_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(device: Any, *, cuda: bool, mps: bool) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return set_up(ComputeParams(device=device, deterministic=False), threads=1, seed=0).type

    assert found("auto", cuda=False, mps=False) == "cpu"
    assert found("auto", cuda=False, mps=True) == "mps"
    assert found("auto", cuda=True, mps=True) == "cuda"
    assert found("cpu", cuda=True, mps=True) == "cpu"
    with pytest.raises(UserError, match=r"compute\.device = cuda: not found on this machine, which has cpu"):
        found("cuda", cuda=False, mps=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_stages_hand_their_parameters_to_the_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: TokenDataset, compiled: bool
) -> None:
    seen: list[Run[Batch]] = []
    compilations: list[Window] = []
    monkeypatch.setattr(tuning, "train", lambda run, watcher: seen.append(run))
    monkeypatch.setattr(Window, "compile", lambda self: compilations.append(self))
    params = params_with(
        seed=6,
        compute={"dtype": "bf16", "compile": compiled},
        optimizer={"beta1": 0.8},
        checkpoint={"every": 17},
        activations={"prefetch": 3},
    )
    window = new_window()
    tuning.train_window(
        params,
        window,
        batches_of(dataset),
        causal=True,
        steps=5,
        lr=0.5,
        lrs={"head.norm.weight": 0.1},
        device=CPU,
        checkpoints=Checkpoints(tmp_path / "c.safetensors"),
        watcher=Log(),
    )
    (run,) = seen
    assert (run.seed, run.lrs, run.begin_step) == (6, {"head.norm.weight": 0.1}, window.begin_step)
    assert compilations == [window] * compiled
    assert (run.dtype, run.checkpoint_every, run.prefetch, run.steps, run.lr) == ("bf16", 17, 3, 5, 0.5)
    assert run.optimizer.beta1 == 0.8
    assert run.checkpoints.file == tmp_path / "c.safetensors"
    (batch,) = run.batches(0)
    causal = window.loss(batch, device=CPU, causal=True)
    assert torch.equal(run.loss(batch), causal)
    assert not torch.equal(window.loss(batch, device=CPU, causal=False), causal)


# --- data


def test_batches_are_a_function_of_the_step(dataset: TokenDataset) -> None:
    forwards, backwards = batches_of(dataset), batches_of(dataset)
    ahead = {step: forwards(step)[0] for step in range(12)}
    behind = {step: backwards(step)[0] for step in reversed(range(12))}
    for step in range(12):
        assert torch.equal(ahead[step].inputs, behind[step].inputs)
        assert torch.equal(ahead[step].targets.rows, behind[step].targets.rows)
        assert torch.equal(ahead[step].targets.tokens, behind[step].targets.tokens)
    assert not torch.equal(ahead[0].inputs, ahead[5].inputs)


def test_every_pass_sees_every_sample_under_fresh_masks(dataset: TokenDataset) -> None:
    seen: dict[int, list[tuple[int, bytes]]] = {}
    batches = batches_of(dataset)
    samples, epochs = batches.order.at(0, 3 * SAMPLES + 2)
    for step in range(len(samples) // BATCH):
        (batch,) = batches(step)
        for row, place in enumerate(range(step * BATCH, (step + 1) * BATCH)):
            sample = int(samples[place])
            original = torch.from_numpy(dataset.samples(np.array([sample]))[0])
            visible = batch.inputs[row] != VOCAB
            assert torch.equal(batch.inputs[row][visible], original[visible])
            seen.setdefault(int(epochs[place]), []).append((sample, visible.numpy().tobytes()))
    for epoch in range(3):
        assert sorted(sample for sample, _ in seen[epoch]) == list(range(SAMPLES))
    assert [s for s, _ in seen[0]] != [s for s, _ in seen[1]]
    assert dict(seen[0]) != dict(seen[1])


def prefetching() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "prefetch"]


def test_loader_ends_when_the_loop_fails(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        assert prefetching()
        raise ArithmeticError("broken step")

    monkeypatch.setattr(loop, "_step", fails)
    with pytest.raises(ArithmeticError, match="broken step"):
        setting.run(steps=1000)
    assert not prefetching()


def test_loader_ends_with_the_loop(setting: Setting) -> None:
    setting.run()
    assert not prefetching()


def test_window_needs_embeddings_for_tokens(dataset: TokenDataset) -> None:
    window = new_window()
    window.embeddings = None
    (batch,) = batches_of(dataset)(0)
    with pytest.raises(AssertionError, match="token ids need embeddings"):
        window.loss(batch, device=CPU, causal=False)
    boundary = torch.randn(BATCH, SEQ, 16).bfloat16()
    out = window(boundary, Context())
    assert out.dtype == torch.float32
    assert isinstance(window.stacks, nn.ModuleList)
