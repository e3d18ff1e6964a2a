"""Windows put together of what earlier trainings have left: what learns, what stays as it is, what is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stackwise.config.growth import GrowthParams, Kind
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params
from stackwise.config.training import OptimizerParams
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.errors import UserError
from stackwise.growth.assembly import Assembly
from stackwise.growth.batches import TokenBatches
from stackwise.growth.fusing import fuse
from stackwise.growth.init import initialize
from stackwise.growth.phases import KEPT, phases
from stackwise.growth.racks import load_rack, save_rack
from stackwise.growth.stacks import EMBEDDINGS, Training, latest_adapters, stack_file
from stackwise.growth.trunk import AdaptedStack, adapted_stacks, trunk_of
from stackwise.growth.window import Batch, Unfreezing, Window
from stackwise.model.context import Context
from stackwise.model.rack import Rack, RackShape
from stackwise.model.stack import Stack
from stackwise.objectives.loss import consistency_loss
from stackwise.objectives.targets import MaskDiffusionObjective, masked_targets
from stackwise.precision import formats
from stackwise.precision.stored import StoredLinear
from stackwise.precision.trunk import TrunkStack
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Run, train
from tests.unit.growing import CPU, params_with, published, quantized, window_of
from workflow.stages import table

VOCAB, SEQ, BATCH, D_MODEL = 29, 12, 4, 64
MODEL = ModelParams(d_model=D_MODEL, attention=AttentionParams(n_heads=4), mlp=MLPParams(hidden=96))
TIED = MODEL.model_copy(update={"tie_embeddings": True})
DROPPING = MODEL.model_copy(update={"attention": AttentionParams(n_heads=4, dropout=0.5)})
REDRAWN = MODEL.model_copy(update={"attention": AttentionParams(type="kernel", n_heads=4, redraw=2)})
LORA = {"stack": {"rank": 2}, "trunk": {"rank": 2}}
RUN_AGAIN = "run `dvc repro` or `snakemake`, which train what does not fit again"


def params_of(model: ModelParams = MODEL, **sections: Any) -> Params:
    return params_with(model=model, **{"adapters": LORA, **sections})


def batches(step: int, *, boundary: bool = False) -> list[Batch]:
    """The one batch of a step: tokens with masks, or something in place of a boundary."""
    rng = np.random.default_rng(step)
    tokens, mask = rng.integers(0, VOCAB, (BATCH, SEQ)), rng.random((BATCH, SEQ)) < 0.5
    inputs = torch.from_numpy(np.where(mask, VOCAB, tokens))
    if boundary:
        inputs = torch.from_numpy(rng.standard_normal((BATCH, SEQ, D_MODEL)).astype(np.float32))
    return [Batch(inputs, masked_targets(tokens, mask, np.ones(BATCH)))]


def loss_of(window: Window, step: int = 0) -> Tensor:
    return window.loss(batches(step)[0], device=CPU, causal=False)


class Silent:
    """A watcher that stops training before a step."""

    def __init__(self, window: Window, stop_at: int | None = None) -> None:
        self._window, self._stop_at = window, stop_at
        self.resumed_from: int | None = None
        self.modes: list[list[bool]] = []
        """Of each step and stack: whether it was in training mode."""
        self.contents: list[dict[str, Tensor]] = []
        """Of the window, before each step."""

    def resumed(self, step: int) -> None:
        self.resumed_from = step

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        pass

    def begin_step(self, step: int) -> None:
        if step == self._stop_at:
            raise KeyboardInterrupt
        self._window.begin_step(step)
        self.modes.append([stack.training for stack in self._window.stacks])
        self.contents.append(contents(self._window))


def learned(
    assembly: Assembly,
    directory: Path,
    *,
    steps: int = 3,
    boundary: bool = False,
    stop_at: int | None = None,
    params: Params | None = None,
    **settings: Any,
) -> Silent:
    """Train a window as the pipeline does."""
    window, watcher = assembly.window, Silent(assembly.window, stop_at)
    run = Run(
        module=window,
        batches=partial(batches, boundary=boundary),
        begin_step=watcher.begin_step,
        loss=partial(window.loss, device=CPU, causal=False),
        steps=steps,
        lr=1e-2,
        lrs=assembly.rates((params or params_of()).adapters),
        optimizer=OptimizerParams(warmup=0.0),
        device=CPU,
        dtype="fp32",
        checkpoints=Checkpoints(directory / "run.safetensors"),
        checkpoint_every=1000,
    )
    for name, value in settings.items():
        setattr(run, name, value)
    train(run, watcher)
    return watcher


def contents(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module, those of quantized matrices too."""
    found: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, part in module.named_modules():
        if isinstance(part, StoredLinear):
            found |= {f"{name}.stored.{i}": tensor for i, tensor in enumerate(part.stored())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and not changed(a, b)


def some_tokens() -> Tensor:
    return torch.randint(0, VOCAB + 1, (3, SEQ), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(module: Window | Rack) -> Tensor:
    if isinstance(module, Rack):
        return module.logits(some_tokens())
    return module.head(module(some_tokens(), Context()))


class Grown:
    """A rack of three stacks that were added on top, each of them quantized as well."""

    def __init__(self, directory: Path, model: ModelParams) -> None:
        self.model = model
        self.trainings: list[Training] = []
        self.trunk: list[TrunkStack] = []
        for k in range(3):
            assembly = self.window(f"{k}=new", k, embeddings_learn=not k, reads_tokens=not k)
            learned(assembly, directory, boundary=k > 0)
            self.trainings.append(published(directory / f"stack-{k}", assembly, self.trainings))
            self.trunk.append(quantized(self.trainings[-1].stack(k), directory / f"trunk-{k}", "nf4"))

    def window(self, members: str, after: int = 1, *, params: Params | None = None, **options: Any) -> Assembly:
        """A window on the ground of the first `after` trainings."""
        return window_of(
            params or params_of(self.model),
            members,
            self.trainings[:after],
            vocab_size=VOCAB,
            **{"quantized": self.trunk, "copies": after - 1 if after else None, **options},
        )


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown(tmp_path_factory.mktemp("grown"), MODEL)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown(tmp_path_factory.mktemp("tied"), TIED)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown(tmp_path_factory.mktemp("dropping"), DROPPING)


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown(tmp_path_factory.mktemp("redrawn"), REDRAWN)


# --- what learns, and what is kept of it


@dataclass(frozen=True)
class Regime:
    """A window."""

    members: str
    after: int
    """The trainings that have taken place."""
    embeddings_learn: bool = False
    boundary: bool = False
    """Whether it reads one, not tokens."""

    def window(self, grown: Grown, **options: Any) -> Assembly:
        learn, tokens = self.embeddings_learn, not self.boundary
        return grown.window(self.members, self.after, embeddings_learn=learn, reads_tokens=tokens, **options)


REGIMES = {
    "first": Regime("0=new", 0, embeddings_learn=True),
    "append": Regime("1=new", 1, boundary=True),
    "window": Regime("0=weights 1=new", 1, embeddings_learn=True),
    "window above a boundary": Regime("1=weights 2=new", 2, boundary=True),
    "qlora": Regime("0=adapters 1=new", 1),
    "lora": Regime("1=lora", 1, boundary=True),
    "prepend": Regime("1=new 0=frozen", 1),
    "prepend, lora": Regime("1=lora 0=frozen", 1),
    "prepend, qlora": Regime("1=new 0=adapters", 1),
    "insert": Regime("1=new 0=weights", 1, embeddings_learn=True),
    "insert, frozen": Regime("1=new 0=frozen", 1, embeddings_learn=True),
    "end to end": Regime("0=new 1=new 2=new", 0, embeddings_learn=True),
    "end to end, one at a time": Regime("0=new 1=initial 2=initial", 0, embeddings_learn=True),
    "sweep": Regime("0=weights 1=frozen 2=frozen", 3, embeddings_learn=True),
}
every_regime = pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES.keys())


def learns(name: str, assembly: Assembly) -> bool:
    """Whether a tensor of a window is to learn."""
    part, _, rest = name.partition(".")
    if part == "embeddings":
        return assembly.embeddings_learn
    if part == "head":
        return True
    place, _, inner = rest.partition(".")
    role = assembly.members[int(place)].role
    return role in ("new", "weights") or (role in ("lora", "adapters") and ".lora_" in inner)


@every_regime
def test_roles_say_what_learns_and_nothing_else_changes(regime: Regime, grown: Grown, tmp_path: Path) -> None:
    assembly = regime.window(grown)
    before = contents(assembly.window)
    assert {name for name, p in assembly.window.named_parameters() if p.requires_grad} == {
        name for name, _ in assembly.window.named_parameters() if learns(name, assembly)
    }
    learned(assembly, tmp_path, boundary=regime.boundary)
    found = changed(before, contents(assembly.window))
    assert found == {name for name in before if learns(name, assembly)}
    assert all(parameter.grad is None for parameter in assembly.window.parameters())


@every_regime
def test_head_is_that_of_the_training_before(regime: Regime, grown: Grown) -> None:
    window = regime.window(grown).window
    if regime.after:
        assert equal(window.head.state_dict(), grown.trainings[regime.after - 1].load_head(None).state_dict())
    if regime.after and window.embeddings is not None:
        assert equal(window.embeddings.state_dict(), grown.trainings[0].load_embeddings().state_dict())
    assert (window.embeddings is None) == regime.boundary


@every_regime
def test_what_has_learned_is_read_back(regime: Regime, grown: Grown, tmp_path: Path) -> None:
    assembly = regime.window(grown)
    began = contents(assembly.window)
    learned(assembly, tmp_path, boundary=regime.boundary)
    training = published(tmp_path / "training", assembly, grown.trainings[: regime.after])
    window, files = assembly.window, {f.name for f in training.artifact.path.glob("*.safetensors")}
    kept = [member.stack for member in assembly.members if member.role in KEPT]
    assert training.stacks == tuple(kept)
    assert files == {
        "head.safetensors",
        *(stack_file(k) for k in kept),
        *([EMBEDDINGS] if regime.embeddings_learn else []),
    }
    assert equal(training.load_head(None).state_dict(), window.head.state_dict())
    assert training.has_embeddings == regime.embeddings_learn
    if training.has_embeddings:
        assert window.embeddings is not None
        assert equal(training.load_embeddings().state_dict(), window.embeddings.state_dict())
    for place, (member, stack) in enumerate(zip(assembly.members, window.stacks, strict=True)):
        k, kind = member.stack, {"lora": "stack", "adapters": "trunk"}.get(member.role)
        if member.role in ("new", "weights"):
            assert equal(training.stack(k).load_stack().state_dict(), stack.state_dict())
        elif member.role == "lora":  # its own weights are on disk as they began
            own = {
                name.removeprefix(f"stacks.{place}.").replace(".base_layer", ""): tensor
                for name, tensor in began.items()
                if name.startswith(f"stacks.{place}.") and ".lora_" not in name
            }
            assert equal(load_file(training.artifact.path / stack_file(k)), own)
            torch.testing.assert_close(_run(training.stack(k).load_stack()), _run(stack), rtol=0, atol=1e-5)
        for each in get_args(Kind):
            assert (training.adapters_of(k, each) is not None) == (each == kind)


@torch.no_grad()
def _run(stack: nn.Module) -> Tensor:
    return stack(torch.randn(2, SEQ, D_MODEL, generator=torch.Generator().manual_seed(3)), Context())


@pytest.mark.parametrize("role", ["new", "lora"])
@pytest.mark.parametrize("init", ["copy", "zero", "random"])
def test_a_stack_that_is_put_below_begins_as_it_would_on_top(role: str, init: str, grown: Grown) -> None:
    params = params_of(stack={"blocks": 2, "init": init})
    stack = grown.window(f"1={role} 0=frozen", params=params).window.stacks[0]
    drawn = Stack(MODEL, 2)
    initialize(drawn, name="stacks.1", seed=0)
    source: Any = grown.trainings[0].stack(0).load_stack().blocks[0]
    found = {name.replace(".base_layer", ""): w for name, w in stack.state_dict().items() if ".lora_" not in name}
    for name, weight in drawn.state_dict().items():
        expected = weight
        if init == "copy":
            expected = source.state_dict()[name.split(".", 2)[2]]
        elif init == "zero" and name.endswith(("o_proj.weight", "down_proj.weight")):
            expected = torch.zeros_like(weight)
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("regime", [REGIMES["window"], REGIMES["prepend"], REGIMES["append"], REGIMES["sweep"]])
def test_a_tied_head_learns_and_is_frozen_with_the_embeddings(regime: Regime, tied: Grown, tmp_path: Path) -> None:
    assembly = regime.window(tied)
    window, before = assembly.window, contents(assembly.window)
    assert window.embeddings is not None
    assert window.head.weight is window.embeddings.table
    learned(assembly, tmp_path, boundary=regime.boundary)
    found = changed(before, contents(window))
    assert ("embeddings.table" in found) == regime.embeddings_learn
    assert "head.norm.weight" in found
    training = published(tmp_path / "training", assembly, tied.trainings[: regime.after])
    embeddings = training.load_embeddings() if regime.embeddings_learn else tied.trainings[0].load_embeddings()
    assert torch.equal(training.load_head(embeddings).weight, window.head.weight)


def test_each_part_is_fused_as_it_was_trained_last(grown: Grown, tmp_path: Path) -> None:
    assembly = REGIMES["window"].window(grown)
    learned(assembly, tmp_path)
    first = grown.trainings[0]
    rack = fuse([first, published(tmp_path / "second", assembly, [first])], [0, 1], {})
    assert torch.equal(outputs(rack), outputs(assembly.window))


# --- adapters


@pytest.mark.parametrize(
    ("adapted", "plain"),
    [
        ("0=adapters 1=new", "0=frozen 1=new"),
        ("1=lora 0=frozen", "1=new 0=frozen"),
        ("0=frozen 1=lora", "0=frozen 1=new"),
    ],
)
def test_fresh_adapters_change_nothing(adapted: str, plain: str, grown: Grown) -> None:
    assert torch.equal(outputs(grown.window(adapted).window), outputs(grown.window(plain).window))


def test_adapters_of_a_trunk_go_on_where_they_stopped(grown: Grown, tmp_path: Path) -> None:
    first = grown.window("0=adapters 1=new")
    learned(first, tmp_path)
    trainings = [grown.trainings[0], published(tmp_path / "1", first, grown.trainings[:1])]
    assert latest_adapters(trainings, 0) == tmp_path / "1" / "adapters" / "0"
    assert latest_adapters(trainings, 1) is None
    second = window_of(params_of(), "0=adapters 1=weights", trainings, vocab_size=VOCAB, quantized=grown.trunk)
    assert equal(contents(second.window.stacks[0]), contents(first.window.stacks[0]))
    (stack,) = trunk_of([grown.trunk[0].artifact], trainings)
    assert isinstance(stack, AdaptedStack)
    assert stack.digest != grown.trunk[0].digest
    assert torch.equal(_run(stack.load_stack("fp32", CPU)), _run(first.window.stacks[0]))
    assert trunk_of([grown.trunk[1].artifact], trainings) == grown.trunk[1:2]


def test_rates_are_of_parameters_that_the_optimizer_knows(grown: Grown, tmp_path: Path) -> None:
    params = params_of(adapters={"stack": {"rank": 2, "lr": 0.25}, "trunk": {"rank": 2, "lr": 1e-30}})
    assembly = grown.window("0=adapters 1=adapters 2=lora", 2, params=params)
    rates, names = assembly.rates(params.adapters), dict(assembly.window.named_parameters())
    assert rates == {
        name: 0.25 if name.startswith("stacks.2.") else 1e-30
        for name, parameter in names.items()
        if name.startswith("stacks.") and parameter.requires_grad
    }
    before = contents(assembly.window)
    learned(assembly, tmp_path, params=params)
    found = changed(before, contents(assembly.window))
    assert {name for name in rates if name.startswith("stacks.2.")} <= found
    after = contents(assembly.window)
    for name in {name for name in found if name.startswith(("stacks.0.", "stacks.1."))}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-25)
    below = grown.window("1=new 0=adapters").rates(params.adapters)  # by place, not by number
    assert {name[:9] for name in below} == {"stacks.1."}
    without = params_of(adapters={"stack": {"lr": 0.25}, "trunk": {}})
    assert {name[:9] for name in assembly.rates(without.adapters)} == {"stacks.2."}
    assert grown.window("0=weights 1=new").rates(params.adapters) == {}


@pytest.fixture(scope="module")
def adapted(grown: Grown, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Training], list[TrunkStack]]:
    """A stack that has learned adapters as part of the trunk, one that has learned both kinds, and one with a LoRA."""
    directory, trainings, trunk = tmp_path_factory.mktemp("adapted"), grown.trainings[:1], grown.trunk[:1]
    for k in (1, 2):
        members = [*(f"{j}=adapters" for j in range(k)), f"{k}=lora"]
        assembly = window_of(params_of(), " ".join(members), trainings, vocab_size=VOCAB, quantized=trunk, copies=k - 1)
        learned(assembly, directory)
        trainings = [*trainings, published(directory / str(k), assembly, trainings)]
        trunk = [*trunk, quantized(trainings[-1].stack(k), directory / f"trunk-{k}", "int8")]
    return trainings, trunk


def rack_of(adapted: tuple[list[Training], list[TrunkStack]], *, merged: bool) -> Rack:
    trainings, trunk = adapted
    return fuse(trainings, [0, 1, 2], adapted_stacks([s.artifact for s in trunk], trainings), merged=merged)


def test_merged_adapters_compute_what_they_do_beside_the_weights(
    adapted: tuple[list[Training], list[TrunkStack]], grown: Grown, tmp_path: Path
) -> None:
    merged, beside = rack_of(adapted, merged=True), rack_of(adapted, merged=False)
    torch.testing.assert_close(outputs(beside), outputs(merged), rtol=0, atol=1e-4)
    assert not torch.allclose(outputs(fuse(grown.trainings, [0, 1, 2], {})), outputs(merged), rtol=0, atol=1e-2)
    assert merged.state_dict().keys() == Rack(merged.shape).state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    kinds = [{name.split(".")[-2] for name, _ in s.named_parameters() if ".lora_" in name} for s in beside.stacks]
    assert kinds == [{"trunk"}, {"trunk"}, {"stack"}]
    (tmp_path / "tokenizer").mkdir()
    for name, rack in (("merged", merged), ("beside", beside)):
        (tmp_path / name).mkdir()
        save_rack(tmp_path / name, rack, tmp_path / "tokenizer")
        assert (tmp_path / name / "adapters").exists() == (name == "beside")
        loaded = load_rack(tmp_path / name)
        assert equal(loaded.state_dict(), merged.state_dict())
        assert all(p.requires_grad for p in loaded.parameters())


def test_a_fused_rack_computes_what_was_trained(adapted: tuple[list[Training], list[TrunkStack]]) -> None:
    """Adapters lie on what quantization has left of the weights, not on those from before it."""
    trainings, trunk = adapted
    rack = rack_of(adapted, merged=True)
    last = trainings[-1]
    with torch.no_grad():
        x = trainings[0].load_embeddings()(some_tokens())
        for stack in trunk_of([s.artifact for s in trunk[:2]], trainings):
            x = stack.load_stack("fp32", CPU)(x)
        x = last.stack(2).load_stack()(x)
        expected = last.load_head(None)(x)
    torch.testing.assert_close(outputs(rack), expected, rtol=0, atol=1e-4)
    found = adapted_stacks([s.artifact for s in trunk], trainings)
    assert {k: stack.training for k, stack in found.items()} == {0: last, 1: last}
    assert latest_adapters(trainings, 0) == found[0].directory == last.artifact.path / "adapters" / "0"


# --- frozen stacks


def test_gradients_pass_through_frozen_stacks_of_four_bits(grown: Grown) -> None:
    """They are those of the matrices that the codes mean, and nothing that is frozen has one."""
    frozen, plain = (grown.window("2=new 0=frozen 1=frozen", 2).window for _ in range(2))
    for stack in list(plain.stacks)[1:]:
        formats.dequantize(stack)
    for window in (frozen, plain):
        loss_of(window).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in frozen.named_parameters():
        if name.startswith(("stacks.0.", "head.")):
            assert parameter.grad is not None
            assert float(parameter.grad.norm()) > 0, name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)
        else:
            assert parameter.grad is None, name


def test_frozen_stacks_of_a_window_have_no_dropout(dropping: Grown) -> None:
    window = dropping.window("1=new 0=frozen").window.train()
    new, frozen = window.stacks
    assert torch.equal(_run(frozen), _run(frozen))
    assert not torch.equal(_run(new), _run(new))
    assert not torch.equal(outputs(window), outputs(window))
    window.eval()
    assert torch.equal(outputs(window), outputs(window))
    first = dropping.window("0=new 1=initial", 0, embeddings_learn=True).window.train()
    assert [stack.training for stack in first.stacks] == [True, False]


def test_features_of_frozen_stacks_are_not_redrawn(redrawn: Grown, tmp_path: Path) -> None:
    assembly = redrawn.window("1=new 0=frozen")
    before = contents(assembly.window)
    watcher = learned(assembly, tmp_path, steps=5)
    seeds = {name for name in before if name.endswith(".seed")}
    assert {name[:9] for name in seeds} == {"stacks.0.", "stacks.1."}
    drawn = [{name: int(at[name]) for name in seeds} for at in watcher.contents]
    for name in seeds:
        first = int(before[name])
        if name.startswith("stacks.0."):
            assert [at[name] for at in drawn] == [first, first, first + 1, first + 1, first + 2]
        else:
            assert [at[name] for at in drawn] == [first] * 5


def test_a_lora_is_kept_with_the_features_that_it_has_learned_on_last(redrawn: Grown, tmp_path: Path) -> None:
    """Wherever the window was meanwhile: another device makes other tensors of its buffers."""
    assembly = redrawn.window("0=frozen 1=lora")
    for part in assembly.window.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.clone())
    learned(assembly, tmp_path, steps=5)
    training = published(tmp_path / "lora", assembly, redrawn.trainings[:1])
    torch.testing.assert_close(_run(training.stack(1).load_stack()), _run(assembly.window.stacks[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("members", ["2=new 0=frozen 1=frozen", "0=adapters 1=adapters 2=new"])
def test_activation_checkpointing_changes_no_gradient(members: str, dropping: Grown) -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        params = params_of(DROPPING, compute={"activation_checkpointing": checkpointing}, stack={"blocks": 2})
        window = dropping.window(members, 2, params=params).window.train()
        assert [stack.checkpointing for stack in window.stacks] == [checkpointing] * 3
        torch.manual_seed(0)
        loss_of(window).backward()
        gradients.append({name: p.grad for name, p in window.named_parameters() if p.grad is not None})
    assert equal(*gradients)
    assert len(gradients[0]) > 10


# --- gradual unfreezing


def test_older_parts_begin_to_learn_one_after_another(grown: Grown, tmp_path: Path) -> None:
    """The topmost first, the embeddings last; part i of n from step `steps * (i + 1) / n` on."""
    assembly = grown.window("0=weights 1=weights 2=new", 2, embeddings_learn=True, unfreeze_steps=6)
    watcher = learned(assembly, tmp_path, steps=8)
    states = [*watcher.contents, contents(assembly.window)]
    begin = {"stacks.2.": 0, "head.": 0, "stacks.1.": 2, "stacks.0.": 4, "embeddings.": 6}
    for step, (before, after) in enumerate(pairwise(states)):
        found = changed(before, after)
        for prefix, first in begin.items():
            own = {name for name in before if name.startswith(prefix)}
            assert found & own == (own if step >= first else set()), (step, prefix)


def test_adapters_are_unfrozen_and_what_they_lie_on_is_not(grown: Grown, tmp_path: Path) -> None:
    assembly = grown.window("1=new 0=adapters", unfreeze_steps=2)
    before = contents(assembly.window)
    watcher = learned(assembly, tmp_path, steps=5)
    assert not any(name.startswith("stacks.1.") for name in changed(before, watcher.contents[2]))
    found = {name for name in changed(before, contents(assembly.window)) if name.startswith("stacks.1.")}
    assert found == {name for name in before if name.startswith("stacks.1.") and ".lora_" in name}


def test_what_is_still_frozen_computes_as_it_does_in_use(dropping: Grown, redrawn: Grown, tmp_path: Path) -> None:
    """Without dropout, until it learns; its random features are not redrawn before."""
    assembly = dropping.window("0=weights 1=weights 2=new", 2, unfreeze_steps=4)
    assert learned(assembly, tmp_path, steps=5).modes == [
        [False, False, True],
        [False, False, True],
        [False, True, True],
        [False, True, True],
        [True, True, True],
    ]
    assert not any(stack.training for stack in assembly.window.stacks)
    assembly = redrawn.window("0=weights 1=new", unfreeze_steps=3)
    watcher = learned(assembly, tmp_path, steps=5)
    name = next(name for name in watcher.contents[0] if name.startswith("stacks.0.") and name.endswith(".seed"))
    first = int(watcher.contents[0][name])
    assert [int(at[name]) - first for at in watcher.contents] == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(("kind", "stop_at"), [("dropping", 3), ("redrawn", 1), ("redrawn", 5)])
def test_unfreezing_resumes_in_the_same_bits(
    kind: str, stop_at: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    grown: Grown = request.getfixturevalue(kind)

    def new() -> Assembly:
        return grown.window("0=weights 1=weights 2=new", 2, embeddings_learn=True, unfreeze_steps=4)

    whole, resumed = new(), new()
    learned(whole, tmp_path / "whole", steps=6)
    with pytest.raises(KeyboardInterrupt):
        learned(new(), tmp_path, steps=6, stop_at=stop_at, checkpoint_every=1)
    assert learned(resumed, tmp_path, steps=6).resumed_from == stop_at
    assert equal(contents(whole.window), contents(resumed.window))


def test_which_parts_learn_is_a_function_of_the_step(grown: Grown) -> None:
    parts = [grown.trainings[k].stack(k).load_stack() for k in range(3)]
    next(parts[1].parameters()).requires_grad_(False)  # never learns
    unfreezing = Unfreezing(parts, 10)
    for step in (0, 2, 3, 7, 6, 10, 3, 9, 100):
        unfreezing.begin_step(step)
        for part, first in zip(parts, (3, 7, 10), strict=True):
            never = [next(parts[1].parameters())]
            for parameter in part.parameters():
                assert parameter.requires_grad == (step >= first and parameter is not never[0])


# --- consistency


def known_batch(window: Window) -> tuple[Batch, Tensor]:
    """A batch that says what the stacks above know, and that as the residual stream."""
    (batch,), (other,) = batches(0), batches(1)
    assert window.embeddings is not None
    return Batch(batch.inputs, batch.targets, known=other.inputs), window.embeddings(other.inputs)


def test_consistency_is_the_relative_distance_to_what_is_known(grown: Grown) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = sum(float((a - b) ** 2) for a, b in zip(x.flatten(), known.flatten(), strict=True))
    expected /= sum(float(b**2) for b in known.flatten())
    assert consistency_loss(x, known).item() == pytest.approx(expected, rel=1e-6)
    assert consistency_loss(known, known) == 0
    assert consistency_loss(0 * x, known) == pytest.approx(1)

    window = grown.window("1=new 0=frozen", consistency=0.7).window
    batch, stream = known_batch(window)
    with torch.no_grad():
        plain = window.loss(Batch(batch.inputs, batch.targets), device=CPU, causal=False)
        assert window.embeddings is not None
        out = window.stacks[0](window.embeddings(batch.inputs), Context())
        expected = float(plain) + 0.7 * float((out - stream).square().sum() / stream.square().sum())
        assert float(window.loss(batch, device=CPU, causal=False)) == pytest.approx(expected, rel=1e-5)


def test_a_consistency_of_no_weight_changes_nothing(grown: Grown) -> None:
    gradients = []
    for known in (False, True):
        window = grown.window("1=new 0=frozen").window
        batch = known_batch(window)[0] if known else batches(0)[0]
        window.loss(batch, device=CPU, causal=False).backward()
        gradients.append({name: p.grad for name, p in window.named_parameters() if p.grad is not None})
    assert equal(*gradients)


def test_what_is_known_does_not_learn(grown: Grown) -> None:
    """Above a boundary the embeddings are asked for what is known alone."""
    window = grown.window("1=new 0=frozen", embeddings_learn=True, consistency=1.0).window
    assert window.embeddings is not None
    batch, _ = known_batch(window)
    batch.inputs = torch.randn(BATCH, SEQ, D_MODEL, generator=torch.Generator().manual_seed(0))
    window.loss(batch, device=CPU, causal=False).backward()
    assert all(p.requires_grad and p.grad is None for p in window.embeddings.parameters())
    assert all(p.grad is not None for p in window.stacks[0].parameters())


def test_a_stack_learns_to_put_out_what_is_known(grown: Grown, tmp_path: Path) -> None:
    assembly = grown.window("1=new 0=frozen", consistency=100.0)
    batch, stream = known_batch(assembly.window)

    def distance() -> float:
        with torch.no_grad():
            assert assembly.window.embeddings is not None
            out = assembly.window.stacks[0](assembly.window.embeddings(batch.inputs), Context())
            return float(consistency_loss(out, stream))

    before = distance()
    learned(assembly, tmp_path, steps=20, batches=lambda step: [batch])
    assert distance() < 0.5 * before


def test_batches_say_how_the_stacks_above_have_read_the_same_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, VOCAB, 20 * SEQ).astype(np.uint16))
    tokens = TokenDataset(tmp_path / "tokens.npy", SEQ)
    own, known = (MaskDiffusionObjective(ObjectiveParams(variants=2), seed=seed, mask_id=VOCAB) for seed in (0, 1))
    order = SampleOrder(len(tokens), seed=0, stream="s")
    for step in (0, 3, 11):
        samples, passes = order.at(step * 4, 4)
        for variants in (None, 2):
            made = TokenBatches(tokens, order, own, 4, 2, variants=variants, known=known)(step)
            seen = passes if variants is None else passes % variants
            for i, batch in enumerate(made):
                part = slice(2 * i, 2 * i + 2)
                text = tokens.samples(samples[part])
                assert batch.known is not None
                assert np.array_equal(batch.known.numpy(), known(text, samples[part], seen[part]).inputs)
                assert np.array_equal(batch.inputs.numpy(), own(text, samples[part], seen[part]).inputs)
                assert not torch.equal(batch.known, batch.inputs)
    assert TokenBatches(tokens, order, own, 4, 1)(0)[0].known is None


# --- what does not fit


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        window_of(*arguments, **{"vocab_size": VOCAB, **options})
    return str(error.value)


def test_trainings_that_do_not_fit_are_refused(grown: Grown, tied: Grown, tmp_path: Path) -> None:
    first, second, _ = grown.trainings
    another = "is of another architecture or vocabulary; " + RUN_AGAIN
    longer = MODEL.model_copy(update={"norm_eps": 1e-3})
    for params, trainings in ((params_of(longer), [first]), (params_of(), [first, tied.trainings[1]])):
        assert refusal(params, "2=new", trainings) == f"{trainings[-1].artifact.path}: {another}"
    assert refusal(params_of(), "1=new", [first], vocab_size=VOCAB + 1) == f"{first.artifact.path}: {another}"
    lacking = "none of the trainings given holds its weights; " + RUN_AGAIN
    assert refusal(params_of(), "0=weights 2=new", [second]) == f"stack 0: {lacking}"
    assert refusal(params_of(), "2=new", [second], copies=0, reads_tokens=False) == f"stack 0: {lacking}"
    message = "embeddings: none of the trainings given holds them; " + RUN_AGAIN
    assert refusal(params_of(), "2=new", [second]) == message
    adapted = published(tmp_path / "adapted", grown.window("0=adapters 1=new"), [first])
    (adapted.artifact.path / "adapters" / "0" / "trunk" / "adapter_model.safetensors").unlink()
    said = refusal(params_of(), "0=adapters 1=weights", [first, adapted], quantized=grown.trunk)
    assert "expected an adapter in PEFT's format (adapter_config.json, adapter_model.safetensors)" in said


@pytest.mark.parametrize("building_mode", ["append", "prepend", "insert"])
def test_no_training_is_missing_from_those_that_are_fused(building_mode: str) -> None:
    """`fuse` wants each to have gone on from the one before, also where it holds nothing that is needed."""
    growth = GrowthParams(building_mode=building_mode, trunk_strategy="frozen", sweeps=1)  # type: ignore[arg-type]
    trainings = [phase.path for phase in phases(growth, 3)]
    stages = [s for s in table(params_of(growth=growth, adapters={}, n_stacks=3)) if "order" in s.arguments]
    assert [stage.name for stage in stages][-1] == "fuse"
    for stage in stages:
        found: Any = stage.arguments["trainings"]
        first = trainings.index(found[0])
        assert found == trainings[first : first + len(found)]
        assert set(found) <= set(stage.inputs)


@pytest.mark.parametrize(("kind", "role"), [("stack", "lora"), ("trunk", "adapters")])
def test_projections_that_the_architecture_lacks_are_named(kind: Kind, role: str, grown: Grown) -> None:
    params = params_of(adapters={kind: {"target_modules": ["q_proj", "query"]}})
    members = f"0={role} 1=new" if kind == "trunk" else f"0=frozen 1={role}"
    said = refusal(params, members, grown.trainings[:1], quantized=grown.trunk, copies=0)
    assert said.startswith(f"adapters.{kind}.target_modules = ['q_proj', 'query']: stack {int(kind == 'stack')} has no")


# --- depth as time


ENTRIES = (0.9, 0.5, 0.2)


def unrolled(entries: Sequence[float]) -> Rack:
    shape = RackShape.of(MODEL, (1, 1, 1), VOCAB)
    rack = Rack(RackShape(shape.model, shape.stacks, VOCAB, D_MODEL, D_MODEL, tuple(entries)))
    for name, part in rack.named_children():
        initialize(part, name=name, seed=0)
    with torch.no_grad():
        rack.embeddings.table.mul_(100)
        rack.embeddings.mask.mul_(100)
    return rack.eval()


def test_the_entry_is_the_highest_stack_that_knows_so_many_masks() -> None:
    shape = unrolled(ENTRIES).shape
    found = {t: shape.entry(t) for t in (1.0, 0.91, 0.9, 0.51, 0.5, 0.21, 0.2, 0.01)}
    assert found == {1.0: 0, 0.91: 0, 0.9: 0, 0.51: 0, 0.5: 1, 0.21: 1, 0.2: 2, 0.01: 2}
    assert all(unrolled(()).shape.entry(t) == 0 for t in found)
    assert RackShape.from_json(shape.to_json()) == shape


def test_what_enters_higher_passes_by_the_stacks_below() -> None:
    rack, tokens = unrolled(ENTRIES), some_tokens()
    with torch.no_grad():
        assert torch.equal(rack(tokens, entry=0), rack(tokens))
        for entry in range(3):
            x = rack.embeddings(tokens)
            for stack in list(rack.stacks)[entry:]:
                x = stack(x)
            assert torch.equal(rack(tokens, entry=entry), x)
