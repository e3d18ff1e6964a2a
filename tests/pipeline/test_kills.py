"""kill -9 in the middle: nothing half-written is taken for valid, and the next run ends as if nothing had happened."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from stackwise.artifacts.manifest import MANIFEST, read
from stackwise.config.params import load
from workflow.stages import table

if TYPE_CHECKING:
    from tests.pipeline.conftest import Point, Project

TRAIN_STEPS, CHECKPOINT_EVERY = 20, 5  # of conftest.TINY


def half_written(artifact: str) -> "Point":
    """All files are there, and the manifest is about to be written."""
    return ("open", rf"\.{artifact}\.partial/{MANIFEST}", 1)


def unpublished(name: str) -> "Point":
    """An artifact or a file is complete under its temporary name."""
    return ("os.rename", rf"/\.{name}\.partial ", 1)


def before_step(step: int) -> "Point":
    """Step number `step` of this run of the training loop, from 1, is about to be taken."""
    return ("call", "stackwise/training/loop.py:_step", step)


SHARD: "Point" = ("os.rename", r"\.shard\.\S+ \S+/c/0/0/0", 1)
SCRIPT, GROUP = False, True


def kills(engine: str, step: int) -> list[tuple[str, "Point", bool]]:
    """Stage, where it is killed, and whether with all that the engine has started. Training is killed before `step`."""
    if engine == "snakemake":
        return [
            ("corpus", half_written("corpus"), GROUP),
            ("tokenize", unpublished("tokens"), SCRIPT),
            ("train_stack_0", before_step(step), SCRIPT),
            ("quantize_trunk_0", half_written("0"), GROUP),
            ("cache_activations_1", SHARD, SCRIPT),
            ("train_stack_1", before_step(step), GROUP),
            ("fuse", half_written("fused"), SCRIPT),
            ("fine_tune_clm", unpublished("clm"), GROUP),
            ("evaluate_diffusion", unpublished(r"diffusion\.json"), SCRIPT),
            ("report", half_written("report"), GROUP),
        ]
    return [
        ("corpus", unpublished("corpus"), SCRIPT),
        ("tokenize", half_written("tokens"), GROUP),
        ("train_stack_0", before_step(step), GROUP),
        ("quantize_trunk_0", unpublished("0"), SCRIPT),
        ("cache_activations_1", SHARD, GROUP),
        ("train_stack_1", before_step(step), SCRIPT),
        ("train_stack_1", unpublished(r"stack_1\.json"), GROUP),  # the artifact is there, its loss curve is not
        ("fuse", unpublished("fused"), GROUP),
        ("fine_tune_clm", before_step(4), SCRIPT),
        ("evaluate_diffusion", unpublished(r"diffusion\.json"), GROUP),
        ("report", unpublished(r"depth\.json"), SCRIPT),
    ]


@pytest.mark.parametrize("engine", ["snakemake", "dvc"])
def test_killed_in_every_kind_of_stage(
    engine: str, unbuilt: "Project", finished: "Project", copy: Callable[["Project"], "Project"]
) -> None:
    """Build from nothing with one engine, killed once or more on the way through every kind of stage."""
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    step = random.Random(seed).randint(CHECKPOINT_EVERY + 1, TRAIN_STEPS)
    print(f"KILL_SEED={seed}: training is killed before step {step}")
    project = copy(unbuilt)
    command = ["snakemake", "--cores", "2"] if engine == "snakemake" else ["dvc", "repro"]
    planned = kills(engine, step)
    for stage, point, everything in planned:
        with project.held(*command, at={stage: point}) as held:
            held.kill(everything=everything)
        verify_all(project)
        assert stage in project.changed()
    project.engine(engine)

    assert project.files() == finished.files()
    assert project.changed() == set()
    assert project.planned() == set()
    records = project.records()
    cut_short = Counter(record[0]["stage"] for record in records if record[-1]["event"] != "end")
    assert cut_short >= Counter(stage for stage, _, _ in planned)  # others ran beside them
    if engine == "dvc":  # nothing ran beside them, and nothing that was done was done again
        assert cut_short == Counter(stage for stage, _, _ in planned)
        done = Counter(record[0]["stage"] for record in records if record[-1]["event"] == "end")
        assert done == Counter(record[0]["stage"] for record in finished.records())
    project.ran()
    project.engine("dvc" if engine == "snakemake" else "snakemake")
    assert project.ran() == []

    # Training went on from the last checkpoint, and says so.
    checkpoint = (step - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    for k in (0, 1):
        resumed = [resumed_from(record) for record in records if record[0]["stage"] == f"train_stack_{k}"]
        last = TRAIN_STEPS - CHECKPOINT_EVERY
        assert resumed == ([None, checkpoint, last] if (engine, k) == ("dvc", 1) else [None, checkpoint])
        log = (project.root / f"logs/train_stack_{k}.log").read_text()
        assert f"resumed from step {checkpoint} of {TRAIN_STEPS}" in log


def verify_all(project: "Project") -> None:
    """Whatever stands where an artifact should be is a whole one."""
    for stage in table(load(project.params)):
        for path in map(project.root.joinpath, stage.outputs):
            if path.exists():
                read(path, kind=json.loads((path / MANIFEST).read_text())["kind"])


def resumed_from(record: list[dict[str, Any]]) -> int | None:
    """The step from which a stage went on, by its record."""
    return next((event["step"] for event in record if event["event"] == "resumed"), None)


def test_killed_while_dvc_wrote_its_own_files(project: "Project") -> None:
    """DVC writes them in place, and refuses every command over half of one. Snakemake's next run puts that right."""
    project.set_param("samples.repetition_penalty", 1.5)
    project.call("python", "-m", "workflow.stages")
    project.dvc("repro")
    assert project.ran() == ["check_params", "report", "sample_clm", "score_samples"]
    files, lock = project.files(), project.root / "dvc.lock"
    whole = lock.read_text()
    for size in (0, whole.rindex("md5: ") + len("md5")):  # emptied; cut within a key, which is no YAML
        lock.write_text(whole[:size])
        assert project.call("dvc", "status", check=False).returncode
        project.snakemake()
        # What the lock of the last commit does not know comes out of DVC's run-cache; check_params makes nothing.
        assert project.ran() == ["check_params"]
        assert project.changed() == set()
        assert project.files() == files

    notes = project.root / ".dvc/tmp/rwlock"
    assert notes.exists()
    notes.write_text("")
    assert project.call("dvc", "status", check=False).returncode
    assert project.planned() == set()
    assert project.changed() == set()


def test_a_merge_of_two_locks_is_left_to_the_user(project: "Project") -> None:
    lock = project.root / "dvc.lock"
    conflict = f"<<<<<<< ours\n{lock.read_text()}=======\n>>>>>>> theirs\n"
    lock.write_text(conflict)
    refused = project.call("snakemake", "--dry-run", check=False)
    assert refused.returncode
    assert "dvc.lock" in refused.stderr
    assert lock.read_text() == conflict
