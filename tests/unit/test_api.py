"""StackWise from Python: the same bytes as the pipeline, and racks of which learns what was asked for."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stackwise.api import (
    ProgressiveDataLoader,
    ProgressiveRackBuilder,
    ProgressiveTrainer,
    StackWiseConfig,
    UnifiedTrainer,
    UserError,
)
from stackwise.artifacts.manifest import read
from stackwise.config.growth import LoRAParams
from stackwise.data.tokens import open_tokens
from stackwise.growth.init import initialize
from stackwise.growth.racks import load_rack
from stackwise.growth.training import PhaseInputs
from stackwise.growth.window import Batch, Window
from stackwise.model.rack import Rack, RackShape
from stackwise.precision.stored import StoredLinear
from tests.pipeline.inprocess import BASE, Changes, changed, contents, project

VOCAB = 257
QLORA: Changes = {
    "growth.window": 1,
    "growth.trunk_strategy": "qlora",
    "adapters.trunk": {"rank": 2},
    "adapters.stack": {"rank": 2},
    "trunk.precision": "nf4",
}


def config(**values: Any) -> StackWiseConfig:
    return StackWiseConfig.from_dict(changed(BASE, {"fine_tune": {}})).override(**values)


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(w, theirs[n]) for n, w in a.state_dict().items())


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory in which all runs lie; it is the current one meanwhile."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with chdir(root := tmp_path_factory.mktemp("runs")):
        yield root / "runs"
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def trainer(runs: Path) -> ProgressiveTrainer:
    """One that has trained a rack of two stacks as `first`."""
    found = ProgressiveTrainer(config())
    found.train_rack("first")
    return found


# --- config


def test_a_config_is_a_params_file(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    params = StackWiseConfig.from_yaml(repository / "params.yaml").params
    assert params.n_stacks == 4
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        StackWiseConfig.from_yaml(tmp_path / "nowhere.yaml")


def test_values_are_overridden_by_dotted_name() -> None:
    before = config()
    after = before.override(n_stacks=3, stack__steps=7, **{"stacks.2.lr": 0.5, "adapters.stack.rank": 3})
    assert (after.params.n_stacks, after.params.stack.steps, after.params.stack_params(2).lr) == (3, 7, 0.5)
    assert after.params.adapters.stack == LoRAParams(rank=3)
    assert (before.params.n_stacks, before.params.stack.steps) == (2, 4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stack.steps": 0}, "config: stack.steps = 0: expected an integer of at least 1"),
        ({"stack.stesp": 3}, r"stack.stesp = 3: no such parameter; did you mean stack.steps\?"),
        ({"stacks.one.lr": 3.0}, "stacks.one.lr: expected the number of an item in place of one"),
        ({"stack.steps": 0, "seed": -1}, "config: 2 problems\n.*seed = -1.*\n.*stack.steps = 0"),
    ],
)
def test_a_bad_override_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config().override(**values)


# --- builder


def learning(rack: Rack) -> set[str]:
    return {name for name, p in rack.named_parameters() if p.requires_grad}


def names_of(rack: Rack, *parts: str) -> set[str]:
    return {name for name, _ in rack.named_parameters() if name.startswith(parts)}


def quantized(rack: Rack) -> dict[int, set[str]]:
    """The formats' classes in each stack, by place."""
    found = {
        k: {type(m).__name__ for m in s.modules() if isinstance(m, StoredLinear)} for k, s in enumerate(rack.stacks)
    }
    return {k: classes for k, classes in found.items() if classes}


def works(rack: Rack) -> Tensor:
    logits = rack.logits(torch.arange(24).reshape(2, 12))
    assert logits.shape == (2, 12, rack.shape.vocab_size)
    if learning(rack):
        logits.square().mean().backward()
        assert {name for name, p in rack.named_parameters() if p.grad is not None} == learning(rack)
    return logits


def test_a_frozen_trunk_below_a_stack_that_learns() -> None:
    builder = ProgressiveRackBuilder(config(), vocab_size=VOCAB)
    rack = (
        builder.append_stack(n_blocks=2, precision="nf4").append_stack().freeze_trunk().append_stack(n_blocks=3)
    ).build_rack()
    assert [len(stack.blocks) for stack in rack.stacks] == [2, 1, 3]  # type: ignore[arg-type]
    assert learning(rack) == names_of(rack, "stacks.2.", "head.")
    assert quantized(rack) == {0: {"FourBitLinear"}, 1: {"RoundedLinear"}}
    works(rack)


def test_nothing_but_qlora_learns() -> None:
    builder = ProgressiveRackBuilder(config(), vocab_size=VOCAB)
    rack = (
        builder.append_stack()
        .append_stack(precision="int8")
        .freeze_all_but_qlora(LoRAParams(rank=3), "fp8")
        .build_rack()
    )
    assert quantized(rack) == {0: {"Fp8Linear"}, 1: {"Fp8Linear"}}
    assert learning(rack) == {name for name in names_of(rack, "stacks.") if ".lora_" in name}
    assert {p.shape[0] for name, p in rack.named_parameters() if ".lora_A." in name} == {3}
    works(rack)
    more = builder.append_stack().build_rack()
    assert learning(more) == learning(rack) | names_of(more, "stacks.2.")
    assert quantized(more).keys() == {0, 1}


def test_a_format_that_is_asked_for_is_taken_without_freezing() -> None:
    rack = (
        ProgressiveRackBuilder(config(), vocab_size=VOCAB)
        .append_stack(precision="bfloat16")
        .append_stack()
        .build_rack()
    )
    assert quantized(rack) == {0: {"RoundedLinear"}}
    assert learning(rack) == names_of(rack, "embeddings.", "stacks.1.", "head.")
    whole = (
        ProgressiveRackBuilder(config(), vocab_size=VOCAB).append_stack(precision="full").freeze_trunk().build_rack()
    )
    assert quantized(whole) == {}
    assert learning(whole) == names_of(whole, "head.")


@pytest.mark.parametrize(("mode", "order"), [("append", [0, 1, 2]), ("prepend", [2, 1, 0]), ("insert", [1, 2, 0])])
@pytest.mark.parametrize("init", ["random", "zero", "copy"])
def test_stacks_begin_as_in_the_pipeline_wherever_they_go(mode: Any, order: list[int], init: str) -> None:
    """By name: the seed and the number of a stack. A copy is that of the neighbour."""
    found = config(**{"stack.init": init, "n_stacks": 3, "growth.building_mode": mode})
    builder = ProgressiveRackBuilder(found, mode, vocab_size=VOCAB)
    for _ in range(3):
        getattr(builder, f"{mode}_stack")()
    rack, again = builder.build_rack(), builder.build_rack()
    assert same(rack, again)
    assert rack.stacks[0] is not again.stacks[0]
    fresh = Rack(RackShape.of(found.params.model, [1, 1, 1], VOCAB))
    for k, stack in enumerate(fresh.stacks):
        initialize(stack, name=f"stacks.{0 if init == 'copy' else k}", seed=0)
        if init == "zero":
            for name, p in stack.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    nn.init.zeros_(p)
    assert all(same(stack, fresh.stacks[k]) for stack, k in zip(rack.stacks, order, strict=True))


def test_a_trained_rack_goes_on_growing(trainer: ProgressiveTrainer) -> None:
    trained = trainer.train_rack("first")
    rack = (
        ProgressiveRackBuilder(config(**{"stack.init": "copy"}), rack=trained)
        .freeze_trunk("int8")
        .append_stack()
        .build_rack()
    )
    assert same(rack.stacks[2], trained.stacks[1])
    assert same(rack.head, trained.head)
    assert quantized(rack) == {0: {"EightBitLinear"}, 1: {"EightBitLinear"}}
    assert learning(rack) == names_of(rack, "stacks.2.", "head.")
    assert not quantized(trained)
    for mode, place, neighbour in (("prepend", 0, 0), ("insert", 1, 1), ("append", 2, 1)):
        copying = ProgressiveRackBuilder(config(**{"stack.init": "copy"}), mode, rack=trained)  # type: ignore[arg-type]
        assert same(getattr(copying, f"{mode}_stack")().build_rack().stacks[place], trained.stacks[neighbour])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda b: b.prepend_stack(), "building_mode = append: prepend_stack.. needs prepend"),
        (lambda b: b.append_stack(precision="int4"), "precision = int4: expected full, half"),
        (lambda b: b.append_stack(n_blocks=0), "stacks.0.blocks = 0: expected an integer of at least 1"),
        (lambda b: b.freeze_trunk(), "freeze_trunk.*there is no stack yet"),
        (lambda b: b.build_rack(), "build_rack.*there is no stack yet"),
        (
            lambda b: b.append_stack().freeze_all_but_qlora(LoRAParams(target_modules=["x"])).build_rack(),
            "no projection x",
        ),
    ],
)
def test_a_builder_names_what_is_wrong(build: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(ProgressiveRackBuilder(config(), vocab_size=VOCAB))


def test_a_builder_must_know_mode_and_vocabulary() -> None:
    with pytest.raises(UserError, match="building_mode = up: expected append, prepend or insert"):
        ProgressiveRackBuilder(config(), "up")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="vocab_size = None: expected the number of the tokenizer's ids"):
        ProgressiveRackBuilder(config())


# --- the trainer and the pipeline


@pytest.mark.parametrize(
    "changes",
    [{}, {**QLORA, "n_stacks": 3}, {"growth.building_mode": "prepend", "growth.sweeps": 1, "stack.stop_every": 2}],
    ids=["append", "adapters", "prepend"],
)
def test_a_run_leaves_the_bytes_of_the_pipeline(changes: Changes, tmp_path: Path) -> None:
    rack = ProgressiveTrainer(config(**changes), tmp_path / "runs").train_rack("run")
    (tmp_path / "pipeline").mkdir()
    with project(tmp_path / "pipeline") as pipeline:
        pipeline.run({"fine_tune": {}, **changes})
        theirs = {str(path): contents(path) for path in artifacts(Path())}
        assert same(rack, load_rack(Path("artifacts/fused")))
    with chdir(tmp_path / "runs/run"):
        ours = {str(path): contents(path) for path in artifacts(Path())}
    assert ours == theirs
    assert len([path for path in ours if "stacks" in path]) >= 2


def artifacts(root: Path) -> list[Path]:
    """All artifacts but the identities of boundaries, and the loss curves of the trainings."""
    made = [file.parent for file in root.glob("artifacts/**/manifest.json")]
    return sorted(path for path in [*made, *root.glob("metrics/loss/*")] if "activations" not in path.parts)


def test_what_is_there_is_not_made_again(trainer: ProgressiveTrainer, runs: Path) -> None:
    manifests = sorted((runs / "first").rglob("manifest.json"))
    before = [file.stat().st_mtime_ns for file in manifests]
    trainer.train_rack("first")
    assert [file.stat().st_mtime_ns for file in manifests] == before
    content = (runs / "first/artifacts/stacks/1/stack_1.safetensors").read_bytes()
    (runs / "first/artifacts/stacks/1/stack_1.safetensors").write_bytes(content[:-1] + b"\x00")
    trainer.train_rack("first")  # trains again what is damaged
    assert (runs / "first/artifacts/stacks/1/stack_1.safetensors").read_bytes() == content


def test_an_interrupted_run_goes_on(trainer: ProgressiveTrainer, runs: Path) -> None:
    class Interrupting:
        resumes: list[int]

        def __init__(self) -> None:
            self.resumes, self.trained = [], 0

        def resumed(self, step: int) -> None:
            self.resumes.append(step)

        def stepped(self, step: int, losses: Any, waited: float) -> None:
            self.trained += len(losses)
            if self.trained == 6 and not self.resumes:
                raise KeyboardInterrupt

    watcher, other = Interrupting(), ProgressiveTrainer(config(**{"checkpoint.every": 1}))
    with pytest.raises(KeyboardInterrupt):
        other.train_rack("second", watcher=watcher)
    assert not (runs / "second/artifacts/stacks/1").exists()
    other.train_rack("second", watcher=watcher)
    assert watcher.resumes == [1]
    assert same(load_rack(runs / "second/artifacts/fused"), load_rack(runs / "first/artifacts/fused"))
    assert not list((runs / "second/checkpoints").iterdir())


def test_a_run_has_one_config(trainer: ProgressiveTrainer) -> None:
    with pytest.raises(
        UserError, match=r"run_id = first: the run of this name has stack\.lr = 0\.01, the config has 0\.5"
    ):
        ProgressiveTrainer(config(stack__lr=0.5)).train_rack("first")
    assert ProgressiveTrainer(config(stack__lr=0.5)).default_run_id != trainer.default_run_id
    with pytest.raises(UserError, match=r"run_id = \.\./up: expected letters"):
        trainer.train_rack("../up")
    with pytest.raises(UserError, match="stack = 7, sweep = 0: no training of this regime"):
        trainer.data_loader("first", stack=7)


# --- full precision


def test_full_precision_is_kept_held_against_its_digests_and_restored(tmp_path: Path) -> None:
    trainer = ProgressiveTrainer(config(**{**QLORA, "n_stacks": 3}), tmp_path)
    rack = trainer.train_rack("run")
    with pytest.raises(UserError, match=r"run/.*manifest\.json: missing.*save_full_precision\('run'\)"):
        trainer.validate_full_precision("run")
    trainer.save_full_precision("run")
    digests = trainer.validate_full_precision("run")
    assert {"artifacts/stacks/0", "artifacts/stacks/2", "artifacts/trunk/0"} <= digests.keys()
    assert same(trainer.reconstruct_rack("run"), rack)
    # what the run itself holds may go
    lost = tmp_path / "run/artifacts/stacks/0/stack_0.safetensors"
    content = lost.read_bytes()
    lost.write_bytes(content[:-1] + b"\x01")
    (tmp_path / "run/artifacts/trunk/0/stack.safetensors").unlink()
    assert same(trainer.reconstruct_rack("run"), rack)
    assert lost.parent in trainer.restore_full_precision("run")
    assert lost.read_bytes() == content
    assert (tmp_path / "run/artifacts/trunk/0/stack.safetensors").exists()
    # what was saved may be damaged
    saved = tmp_path / "run/full_precision/artifacts/stacks/0/stack_0.safetensors"
    saved.write_bytes(content[:-1] + b"\x01")
    for use in (trainer.validate_full_precision, trainer.restore_full_precision, trainer.reconstruct_rack):
        with pytest.raises(UserError, match=r"run/.*stack_0\.safetensors: damaged .*save_full_precision"):
            use("run")
    assert lost.read_bytes() == content


# --- data and unified training


def equal(a: Iterable[Batch], b: Iterable[Batch]) -> bool:
    return all(
        torch.equal(x.inputs, y.inputs)
        and torch.equal(x.targets.rows, y.targets.rows)
        and torch.equal(x.targets.tokens, y.targets.tokens)
        for x, y in zip(a, b, strict=True)
    )


def test_a_loader_gives_each_step_of_the_training(trainer: ProgressiveTrainer, runs: Path) -> None:
    for stack, kind in ((0, torch.int64), (1, torch.bfloat16)):
        steps = list(trainer.data_loader("first", stack=stack))
        assert len(steps) == 4
        assert {batch.inputs.dtype for micro in steps for batch in micro} == {kind}
        assert trainer.data_loader("first", stack=stack).depth == stack
        loader = trainer.data_loader("first", stack=stack)
        for step in loader:
            assert equal(step, steps[0])
            break
        later = trainer.data_loader("first", stack=stack)
        later.load_state_dict(loader.state_dict())
        assert len(later) == 3
        assert all(map(equal, later, steps[1:]))
        assert later.step == 4
    direct = ProgressiveDataLoader.of_tokens(config(), runs / "first/artifacts/tokens")
    assert all(map(equal, direct, trainer.data_loader("first", stack=0)))
    often = config(stack__steps=1000)  # many passes over the data, in each of which masks are fresh
    theirs = ProgressiveTrainer(often, tokens=runs / "first/artifacts/tokens").data_loader(stack=0).seek(997)
    ours = ProgressiveDataLoader.of_tokens(often, runs / "first/artifacts/tokens", step=997)
    assert all(map(equal, ours, theirs))


@pytest.mark.parametrize("fresh", [True, False])
def test_masks_recur_unless_they_are_fresh(fresh: bool, runs: Path, trainer: ProgressiveTrainer) -> None:
    """As they must above a cached boundary, which holds so many variants."""
    params = config(stack__steps=1000).params
    inputs = PhaseInputs(
        params=params,
        stack=0,
        members=(),
        embeddings_learn=True,
        fresh=fresh,
        tokens=read(runs / "first/artifacts/tokens", "tokens"),
    )
    seen = {row.numpy().tobytes() for (batch,) in ProgressiveDataLoader(inputs) for row in batch.inputs}
    samples = len(open_tokens(inputs.tokens, params.seq_len).train)
    assert samples * params.objective.variants < 2000
    assert (len(seen) > samples * params.objective.variants) == fresh


def test_a_loader_gives_micro_batches(runs: Path, trainer: ProgressiveTrainer) -> None:
    tokens = runs / "first/artifacts/tokens"
    whole, parts = (
        next(iter(ProgressiveDataLoader.of_tokens(config(optimizer__accumulate=n), tokens))) for n in (1, 2)
    )
    assert [len(batch.inputs) for batch in parts] == [2, 2]
    assert torch.equal(torch.cat([batch.inputs for batch in parts]), whole[0].inputs)


def test_a_loader_names_what_is_wrong(runs: Path, trainer: ProgressiveTrainer) -> None:
    tokens = runs / "first/artifacts/tokens"
    with pytest.raises(UserError, match="stack = 2: expected a number from 0 to 1"):
        ProgressiveDataLoader.of_tokens(config(), tokens, stack=2)
    with pytest.raises(UserError, match="step = 5: expected a number from 0 to 4"):
        ProgressiveDataLoader.of_tokens(config(), tokens, step=5)
    with pytest.raises(UserError, match=r"nowhere.manifest\.json: missing"):
        ProgressiveDataLoader.of_tokens(config(), "nowhere")


def trained(layers: Any, loader: ProgressiveDataLoader, rack: Rack) -> set[str]:
    """The parameters that training has changed."""
    before = {name: p.detach().clone() for name, p in rack.named_parameters()}
    flags = {name: p.requires_grad for name, p in rack.named_parameters()}
    losses = UnifiedTrainer(config(), rack).train_all_layers(loader, layers)
    assert len(losses) == 4
    assert {name: p.requires_grad for name, p in rack.named_parameters()} == flags
    return {name for name, p in rack.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("layers", [["stacks.1"], ["stacks.0.blocks.0", "head"], "all", "embeddings"])
def test_the_layers_that_are_named_learn_together(layers: Any, runs: Path, trainer: ProgressiveTrainer) -> None:
    rack = trainer.train_rack("first")
    loader = ProgressiveDataLoader.of_tokens(config(), runs / "first/artifacts/tokens")
    parts = ["embeddings", "stacks", "head"] if layers == "all" else [layers] if isinstance(layers, str) else layers
    assert trained(layers, loader, rack) == names_of(rack, *(f"{part}." for part in parts))


def test_above_a_cached_boundary_what_lies_below_is_passed_by(trainer: ProgressiveTrainer) -> None:
    rack = trainer.train_rack("first")
    loader = trainer.data_loader("first", stack=1)
    (batch,) = next(iter(trainer.data_loader("first", stack=1)))
    first = Window([rack.stacks[1]], rack.head).loss(batch, device=torch.device("cpu"), causal=False)  # type: ignore[list-item]
    losses = UnifiedTrainer(config(), copy.deepcopy(rack)).train_all_layers(trainer.data_loader("first", stack=1))
    assert losses[0] == first.item()
    assert trained("all", loader, rack) == names_of(rack, "stacks.1.", "head.")
    with pytest.raises(UserError, match=r"layers = stacks\.0: no layer above the boundary at depth 1; expected all"):
        UnifiedTrainer(config(), rack).train_all_layers(loader, ["stacks.0"])


def test_of_quantized_stacks_the_adapters_learn(runs: Path, trainer: ProgressiveTrainer) -> None:
    rack = trainer.train_rack("first")
    loader = ProgressiveDataLoader.of_tokens(config(), runs / "first/artifacts/tokens")
    adapted = ProgressiveRackBuilder(config(), rack=rack).freeze_all_but_qlora(precision="nf4").build_rack()
    changed = trained(["stacks.0", "stacks.1"], loader, adapted)
    assert changed == {name for name in names_of(adapted, "stacks.") if ".lora_" in name}
    frozen = ProgressiveRackBuilder(config(), rack=rack).freeze_trunk("nf4").build_rack()
    with pytest.raises(UserError, match=r"layers = stacks\.0: its weights are quantized and it has no adapters"):
        UnifiedTrainer(config(), frozen).train_all_layers(loader, ["stacks.0"])


def test_unified_training_of_a_new_rack_is_end_to_end_training(runs: Path, trainer: ProgressiveTrainer) -> None:
    """All stacks from the start, on the batches of the highest."""
    whole = config(growth__strategy="end_to_end")
    rack = ProgressiveTrainer(whole, tokens=runs / "first/artifacts/tokens").train_rack()
    unified = UnifiedTrainer(whole)
    loader = ProgressiveDataLoader.of_tokens(whole, runs / "first/artifacts/tokens", stack=1)
    losses = unified.train_all_layers(loader)
    assert np.isfinite(losses).all()
    assert unified.rack is not None
    assert same(unified.rack, rack)


def test_unified_training_goes_on_from_its_checkpoint(runs: Path, trainer: ProgressiveTrainer, tmp_path: Path) -> None:
    tokens, checkpoint = runs / "first/artifacts/tokens", tmp_path / "state.safetensors"
    often = config(**{"checkpoint.every": 2})

    def loader() -> ProgressiveDataLoader:
        return ProgressiveDataLoader.of_tokens(often, tokens)

    class Interrupting:
        def resumed(self, step: int) -> None:
            assert step == 2

        def stepped(self, step: int, losses: Any, waited: float) -> None:
            if step == 4 and not checkpoint.with_suffix(".seen").exists():
                checkpoint.with_suffix(".seen").touch()
                raise KeyboardInterrupt

    uninterrupted, resumed = UnifiedTrainer(often), UnifiedTrainer(often)
    losses = uninterrupted.train_all_layers(loader())
    with pytest.raises(KeyboardInterrupt):
        resumed.train_all_layers(loader(), checkpoint=checkpoint, watcher=Interrupting())
    again = UnifiedTrainer(often)
    assert again.train_all_layers(loader(), checkpoint=checkpoint, watcher=Interrupting()) == losses
    assert uninterrupted.rack is not None
    assert again.rack is not None
    assert same(again.rack, uninterrupted.rack)


def test_layers_that_are_not_there_are_named(runs: Path, trainer: ProgressiveTrainer) -> None:
    loader = ProgressiveDataLoader.of_tokens(config(), runs / "first/artifacts/tokens")
    with pytest.raises(
        UserError, match=r"layers = stacks\.9: no layer; expected all, or some of embeddings, stacks\.0"
    ):
        UnifiedTrainer(config()).train_all_layers(loader, ["stacks.9"])
