"""Early stopping, through the pipeline."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.artifacts.manifest import read
from stackwise.errors import UserError
from stackwise.growth.stacks import KIND
from stackwise.growth.validation import Validation
from tests.pipeline.inprocess import Changes, Pipeline, contents, project

STOPPING: Changes = {
    "stack.steps": 12,
    "stack.lr": 0.3,
    "stack.stop_every": 2,
    "stack.patience": 2,
    "stack.stop_samples": 8,
    "optimizer.schedule": "constant",
    "fine_tune": {},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with project(tmp_path_factory.mktemp("stopping")) as found:
        yield found


def facts(k: int) -> dict[str, Any]:
    """What the artifact of a training tells of it."""
    found = read(Path(f"artifacts/stacks/{k}"), KIND).facts
    return {key: found.get(key) for key in ("steps", "best_step")}


def test_what_is_kept_is_the_best_and_training_ends_when_nothing_better_comes(pipeline: Pipeline) -> None:
    pipeline.run(STOPPING)
    for k in (0, 1):
        stopped, weights = facts(k), contents(Path(f"artifacts/stacks/{k}"))
        best = stopped["best_step"]
        assert 0 < best < 12
        assert stopped["steps"] == min(12, best + 4)
        # With a constant learning rate these are the weights of a training of just so many steps.
        if k == 0:
            pipeline.run({**STOPPING, "stack.steps": best, "stack.patience": 100})
            assert contents(Path("artifacts/stacks/0")) == weights
            assert facts(0) == {"steps": best, "best_step": best}
            pipeline.run(STOPPING)


def test_without_it_every_step_is_taken_and_no_best_is_told(pipeline: Pipeline) -> None:
    pipeline.run({key: value for key, value in STOPPING.items() if "stop" not in key and "patience" not in key})
    assert [facts(k) for k in (0, 1)] == [{"steps": 12, "best_step": None}] * 2


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
def test_a_window_is_validated_alike_above_a_cached_and_above_a_streamed_trunk(
    activations: str, pipeline: Pipeline
) -> None:
    results = []
    for cached in (True, False):
        pipeline.run({**STOPPING, "trunk.activations": activations, "growth.cache_activations": cached})
        results.append((facts(1), contents(Path("artifacts/stacks/1")), Path("metrics/loss/stack_1.json").read_text()))
    assert results[0] == results[1]


@pytest.mark.parametrize("stack", [0, 1])
def test_a_training_that_is_killed_after_its_best_step_ends_in_the_same_bytes(
    stack: int, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(STOPPING)
    manifests = [Path(f"artifacts/stacks/{k}/manifest.json") for k in (0, 1)]
    expected = [manifest.read_bytes() for manifest in manifests]
    at = sum(facts(k)["steps"] // 2 for k in range(stack + 1))  # the last validation of the stack
    assert facts(stack)["best_step"] < facts(stack)["steps"]
    calls: list[float] = []
    validate = Validation.loss

    def killed(self: Validation) -> float:
        calls.append(validate(self))
        if len(calls) == at:
            raise KeyboardInterrupt
        return calls[-1]

    with project(tmp_path) as twin:
        with monkeypatch.context() as patch:
            patch.setattr(Validation, "loss", killed)
            with pytest.raises(UserError, match="interrupted"):
                twin.run({**STOPPING, "checkpoint.every": 3})
        assert len(list(Path(".stackwise/checkpoints").iterdir())) == 1
        twin.run({**STOPPING, "checkpoint.every": 3})
        assert [manifest.read_bytes() for manifest in manifests] == expected
        assert not list(Path(".stackwise/checkpoints").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"type": "clm"}},
        {"growth.building_mode": "prepend", "objective": {"type": "mlm", "mask_max": 0.5}},
        {"growth.building_mode": "insert", "model.document_mask": True, "objective.embedding_weight": 0.5},
        {"growth.window": 1, "growth.unfreeze": 0.5, "model.time": {"mode": "input"}, "growth.masks": "redraw"},
        {"growth.window": 1, "growth.trunk_strategy": "qlora", "adapters.trunk": {"rank": 2}, "trunk.precision": "nf4"},
    ],
    ids=str,
)
def test_every_regime_can_stop(changes: Changes, pipeline: Pipeline) -> None:
    pipeline.run({**STOPPING, "n_stacks": 3, **changes})
    told = [facts(k) for k in range(3)]
    assert all(0 < f["best_step"] <= f["steps"] <= min(12, f["best_step"] + 4) for f in told)
