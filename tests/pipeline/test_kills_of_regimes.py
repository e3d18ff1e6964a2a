"""kill -9 of a training in every regime whose state is not just weights in fp32: it goes on, and ends in the same bits.

What engines make of a kill is shown in `test_kills`; here the last training of a rack is killed as its script.
"""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stackwise.artifacts.code import PROJECT
from stackwise.config.params import load
from stackwise.tracking.record import RECORDS, read_record
from tests.pipeline.conftest import Project
from tests.pipeline.inprocess import SHOWING, Changes, Pipeline, contents, project
from tests.pipeline.test_kills import before_step, resumed_from
from workflow.inprocess import call, outputs, remove
from workflow.stages import Stage, table

STEPS, CHECKPOINT_EVERY = 8, 3
COMMON: Changes = {
    "n_stacks": 3,
    "model": {"d_model": 64, "attention": {"n_heads": 2, "dropout": 0.1}, "mlp": {"hidden": 64}},
    "stack.init": "copy",
    "stack.steps": STEPS,
    "stacks": [],
    "fine_tune": {},
    "checkpoint.every": CHECKPOINT_EVERY,
}
# Matrices of 64 x 64 are the smallest whose moments are kept in 8 bits.
SMALL_STATE: Changes = {"optimizer.state": "int8", "optimizer.in_backward": True, "optimizer.grad_clip": None}
REGIMES: dict[str, Changes] = {
    "qlora": {
        "growth.window": 1,
        "growth.trunk_strategy": "qlora",
        "adapters.trunk": {"rank": 2, "dropout": 0.1, "lr": 3.0e-3},
        "trunk.precision": "nf4",
    },
    "prepend": {"growth.building_mode": "prepend", "growth.consistency": 0.5, "trunk.precision": "int8"},
    "window": {"growth.window": 1, "growth.unfreeze": 0.5, "compute.dtype": "bf16", **SMALL_STATE},
    "streamed": {"growth.cache_activations": False, "trunk.precision": "nf4", "optimizer.accumulate": 2},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with project(tmp_path_factory.mktemp("kills")) as found:
        yield found


def killed(stage: Stage, step: int, environment: dict[str, str]) -> None:
    """Run the script of a training and kill it before step number `step`, from 1."""
    command = [sys.executable, str(PROJECT / stage.path), *stage.command.split()[2:]]
    scripts = Project(Path.cwd(), {**environment, "DVC_STAGE": stage.name})
    with scripts.held(*command, at={stage.name: before_step(step)}) as held:
        held.kill(everything=False)


def resumed() -> list[int | None]:
    """From which step each training that has begun so far went on, oldest first."""
    records = (read_record(path) for path in sorted(RECORDS.glob("*-train_stack_*.jsonl")))
    return [resumed_from(record) for record in records]


@pytest.mark.parametrize("regime", REGIMES)
def test_a_training_that_was_killed_ends_in_the_same_bits(
    regime: str, pipeline: Pipeline, environment: dict[str, str]
) -> None:
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    step = random.Random(seed).randint(CHECKPOINT_EVERY + 1, STEPS)
    print(f"KILL_SEED={seed}: training is killed before step {step}")
    pipeline.run({**COMMON, **REGIMES[regime]}, leave_out=("evaluate", "fine_tune", "fuse", *SHOWING))
    stage = next(stage for stage in table(load()) if stage.name == "train_stack_2")
    artifact = Path(stage.outputs[0])
    uninterrupted = {path: contents(Path(path)) for path in outputs(stage)}
    for path in outputs(stage):
        remove(Path(path))

    killed(stage, step, environment)
    assert not any(Path(path).exists() for path in outputs(stage))
    assert not artifact.with_name(f".{artifact.name}.partial").exists()
    call(stage.command)

    assert {path: contents(Path(path)) for path in outputs(stage)} == uninterrupted
    checkpoint = (step - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    assert resumed()[-2:] == [None, checkpoint]
    assert f"resumed from step {checkpoint} of {STEPS}" in Path(f"logs/{stage.name}.log").read_text()
