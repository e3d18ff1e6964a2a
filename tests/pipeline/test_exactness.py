"""What growth must do exactly: regimes that are the same give the same bytes, and what is frozen keeps its own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stackwise.artifacts.manifest import read
from stackwise.config.params import load
from stackwise.data.tokens import open_tokens
from stackwise.growth.batches import TokenBatches
from stackwise.growth.fusing import fuse
from stackwise.growth.init import initialize
from stackwise.growth.stack_objectives import objective_of_stack, order_of_stack
from stackwise.growth.stacks import KIND, Training
from stackwise.growth.trunk import adapted_stacks, trunk_of
from stackwise.model.rack import Rack, RackShape
from stackwise.objectives.loss import target_loss
from tests.pipeline.inprocess import Changes, Pipeline, project
from workflow.stages import table

COMMON: Changes = {
    "n_stacks": 3,
    "stacks": [],
    "stack.init": "copy",
    "stack.steps": 3,
    "fine_tune": {},
    "evaluate.samples": 2,
    "trunk.precision": "full",
    "trunk.activations": "fp32",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with project(tmp_path_factory.mktemp("exactness")) as found:
        yield found


def weights(path: str) -> dict[str, Tensor]:
    """All tensors of an artifact, by file and name."""
    return {
        f"{file.relative_to(path)}/{name}": tensor
        for file in sorted(Path(path).rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trainings() -> list[str]:
    """The artifacts of all trainings of the current pipeline, in order."""
    return [stage.outputs[0] for stage in table(load()) if stage.script == "train_stack"]


def rack_after(n: int) -> Rack:
    """The rack as the evaluation after `n` trainings builds it."""
    stage = [stage for stage in table(load()) if "trainings" in stage.arguments and stage.script == "evaluate"][n - 1]
    done = [Training(read(Path(path), KIND)) for path in stage.arguments["trainings"]]  # type: ignore[attr-defined]
    trunk = [read(Path(path), "trunk") for path in stage.arguments.get("trunk", [])]  # type: ignore[attr-defined]
    order: list[int] = stage.arguments["order"]  # type: ignore[assignment]
    return fuse(done, order, adapted_stacks(trunk, done))


def logits(rack: Rack) -> Tensor:
    tokens = torch.randint(0, rack.shape.vocab_size + 1, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return rack.logits(tokens)


@pytest.mark.parametrize("mode", ["append", "prepend", "insert"])
def test_a_stack_that_begins_at_zero_leaves_the_rack_as_it_was(mode: str, pipeline: Pipeline) -> None:
    still = {"growth.building_mode": mode, "stack.init": "zero", "growth.trunk_strategy": None}
    # no step changes any number: 1e-30 is lost in every sum
    pipeline.run({**COMMON, **still, "stack.lr": 1.0e-30, "optimizer.weight_decay": 0.0})
    one = logits(rack_after(1))
    assert torch.equal(logits(rack_after(2)), one)
    assert torch.equal(logits(rack_after(3)), one)


def test_training_on_a_streamed_trunk_is_training_on_its_cache(pipeline: Pipeline) -> None:
    def losses_and_weights(**growth: object) -> tuple[str, dict[str, Tensor]]:
        pipeline.run({**COMMON, **{f"growth.{key}": value for key, value in growth.items()}})
        return Path("metrics/loss/stack_2.json").read_text(), weights("artifacts/stacks/2")

    cached = losses_and_weights()
    streamed = losses_and_weights(cache_activations=False)
    assert cached[0] == streamed[0]
    assert equal(cached[1], streamed[1])


def test_a_resident_trunk_gives_what_a_streamed_one_does(pipeline: Pipeline) -> None:
    pipeline.run({**COMMON, "growth.mode": "fused"})
    streamed = weights("artifacts/stacks/2")
    pipeline.forget()  # a parameter that changes no result
    pipeline.run({**COMMON, "growth.mode": "fused", "activations.trunk": "resident"})
    assert equal(weights("artifacts/stacks/2"), streamed)


def test_no_window_is_blockwise_and_the_whole_window_gradual_growth(pipeline: Pipeline) -> None:
    pipeline.run(COMMON)
    blockwise = [weights(path) for path in trainings()]
    pipeline.run({**COMMON, "growth.window": 0})
    assert all(map(equal, blockwise, [weights(path) for path in trainings()]))
    whole = {key: value for key, value in COMMON.items() if key != "trunk.activations"}
    pipeline.run({**whole, "growth.window": None})
    everything = [weights(path) for path in trainings()]
    pipeline.run({**whole, "growth.mode": "fused", "growth.fusion_mode": "trainable"})
    assert all(map(equal, everything, [weights(path) for path in trainings()]))
    assert not equal(everything[-1], blockwise[-1])


def test_end_to_end_is_plain_training_of_the_whole_model(pipeline: Pipeline) -> None:
    changes = {"growth.strategy": "end_to_end", "stack.init": "random", "optimizer.schedule": "constant"}
    whole = {key: value for key, value in COMMON.items() if key != "trunk.activations"}
    pipeline.run({**whole, **changes, "optimizer.weight_decay": 0.0})
    params = load()
    tokens = open_tokens(read(Path("artifacts/tokens"), "tokens"), params.seq_len)
    rack = Rack(RackShape.of(params.model, [params.stack.blocks] * 3, tokens.vocabulary.size))
    initialize(rack.embeddings, name="embeddings", seed=params.seed)
    initialize(rack.head, name="head", seed=params.seed)
    for k, stack in enumerate(rack.stacks):
        initialize(stack, name=f"stacks.{k}", seed=params.seed)
    time = params.model.time
    objective = objective_of_stack(params, 2, time, tokens=tokens.train, mask_id=tokens.vocabulary.mask_id, fresh=True)
    order = order_of_stack(params, 2, time, len(tokens.train))
    batches = TokenBatches(tokens.train, order, objective, params.stack.batch_size, 1)
    optimizer = torch.optim.AdamW(
        rack.parameters(), lr=params.stack.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    for step in range(params.stack.steps):
        (batch,) = batches(step)
        loss = target_loss(rack.head, rack(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rack.parameters(), 1.0)
        optimizer.step()
    trained = Training(read(Path("artifacts/stacks/rack"), KIND))
    for k, stack in enumerate(rack.stacks):
        for name, tensor in trained.stack(k).load_stack().state_dict().items():
            torch.testing.assert_close(tensor, stack.state_dict()[name], rtol=0, atol=1e-6)


REGIMES: dict[str, Changes] = {
    "append": {},
    "window": {"growth.window": 1},
    "qlora": {"growth.window": 1, "growth.trunk_strategy": "qlora", "adapters.trunk": {"rank": 2}},
    "prepend": {"growth.building_mode": "prepend"},
    "prepend, qlora": {
        "growth.building_mode": "prepend",
        "growth.trunk_strategy": "qlora",
        "adapters.trunk": {"rank": 2},
    },
    "insert": {"growth.building_mode": "insert"},
    "insert, frozen": {"growth.building_mode": "insert", "growth.trunk_strategy": "frozen"},
    "lora": {"adapters.stack": {"rank": 2}},
    "sweeps": {"growth.sweeps": 1},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_what_learns_changes_and_nothing_else_does(regime: str, pipeline: Pipeline) -> None:
    pipeline.run({**COMMON, "trunk.precision": "nf4", **REGIMES[regime]})
    stages = {stage.outputs[0]: stage for stage in table(load()) if stage.script == "train_stack"}
    last: dict[int, tuple[str, dict[str, Tensor]]] = {}
    for path, stage in stages.items():
        roles = dict(word.split("=") for word in stage.arguments["window"])  # type: ignore[attr-defined]
        files = {file.name for file in Path(path).rglob("*") if file.is_file()}
        for text, role in roles.items():
            k, weights_file = int(text), f"stack_{text}.safetensors"
            # only what learns with its weights, or begins here, is written
            assert (weights_file in files) == (role in ("new", "weights", "lora"))
            assert (Path(path) / "adapters" / text).exists() == (role in ("lora", "adapters"))
            if role in ("new", "weights", "lora"):
                now = load_file(Path(path) / weights_file)
                if role == "weights":
                    assert not equal(now, last[k][1])
                last[k] = path, now
    # a stack that was frozen or adapted is in the fused rack as it was trained last
    rack = rack_after(len(trainings()))
    order: list[int] = next(s for s in table(load()) if s.name == "fuse").arguments["order"]  # type: ignore[assignment]
    for place, k in enumerate(order):
        path, own = last[k]
        fused = dict(rack.stacks[place].state_dict())
        adapted = any((Path(p) / "adapters" / str(k)).exists() for p in stages)
        assert equal(fused, own) != adapted, k


def test_a_lora_leaves_its_stack_as_it_began(pipeline: Pipeline) -> None:
    pipeline.run({**COMMON, "adapters.stack": {"rank": 2}})
    below = Training(read(Path("artifacts/stacks/0"), KIND)).stack(0).load_stack().state_dict()
    assert equal(load_file("artifacts/stacks/1/stack_1.safetensors"), below)  # a copy of the stack below
    merged = Training(read(Path("artifacts/stacks/1"), KIND)).stack(1).load_stack().state_dict()
    assert not equal(dict(merged), dict(below))


def test_adapters_of_a_trunk_go_on_where_they_stopped(pipeline: Pipeline) -> None:
    pipeline.run(
        {**COMMON, "growth.window": None, "growth.trunk_strategy": "qlora", "adapters.trunk": {"rank": 2}}
        | {"trunk.precision": "nf4", "stack.lr": 1.0e-2}
    )
    first, second = weights("artifacts/stacks/1/adapters/0"), weights("artifacts/stacks/2/adapters/0")
    before = {name: (tensor - second[name]).norm() / tensor.norm() for name, tensor in first.items()}
    assert all(0 < float(change) < 1 for change in before.values())


def trunk_artifacts() -> list[str]:
    return [stage.outputs[0] for stage in table(load()) if stage.script == "quantize_trunk"]


def test_formats_of_single_stacks(pipeline: Pipeline) -> None:
    pipeline.run({**COMMON, "trunk.precision": "bfloat16", "trunk.precisions": [None, "nf4"]})
    found = [stack.precision for stack in trunk_of(read(Path(path), "trunk") for path in trunk_artifacts())]
    assert found == ["bfloat16", "nf4"]


def test_steps_and_learning_rates_follow_the_depth(pipeline: Pipeline) -> None:
    pipeline.run({**COMMON, "stack.steps": 2, "stack.steps_factor": 2.0})
    facts = [read(Path(path), KIND).facts["steps"] for path in trainings()]
    assert facts == [2, 4, 8]


@pytest.mark.parametrize(("masks", "same"), [("reuse", True), ("redraw", False)])
def test_redrawn_masks_differ_from_stack_to_stack(masks: str, same: bool, pipeline: Pipeline) -> None:
    pipeline.run({**COMMON, "growth.masks": masks})
    params, tokens = load(), open_tokens(read(Path("artifacts/tokens"), "tokens"), 16).train
    samples = np.arange(4)
    first, second = (
        objective_of_stack(params, k, params.model.time, tokens=tokens, mask_id=999)(
            tokens.samples(samples), samples, samples * 0
        ).inputs
        for k in (1, 2)
    )
    assert np.array_equal(first, second) == same
