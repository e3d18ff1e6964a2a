"""Flipped bytes, truncated and missing files: every reader stops with one clear line, and the engines repair it."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from stackwise.artifacts.manifest import MANIFEST, read
from stackwise.data.order import SampleOrder
from stackwise.errors import UserError

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

Damage = Callable[[Path], None]


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit in place, as a disk or a careless program would; by default in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 if at is None else at)
        byte = file.read(1)[0] ^ 0x01
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte]))


def truncate(path: Path) -> None:
    """Cut off the second half."""
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, Damage] = {"flipped": flip, "truncated": truncate, "missing": Path.unlink}

CONSUMERS = {
    "artifacts/corpus": "tokenize",
    "artifacts/tokens": "train_stack_0",
    "artifacts/stacks/0": "quantize_trunk_0",
    "artifacts/trunk/0": "cache_activations_1",
    "artifacts/activations/1": "train_stack_1",
    "artifacts/fused": "fine_tune_diffusion",
    "artifacts/finetuned/clm": "evaluate_clm",
    "artifacts/samples/clm": "report",
}
"""A stage that reads each kind of artifact. The report's only reader is Snakemake."""
KINDS = [*CONSUMERS, "artifacts/report"]


@pytest.fixture(scope="module")
def victim(finished: "Project", tmp_path_factory: pytest.TempPathFactory) -> "Project":
    """A finished project in which each test puts right what it has damaged."""
    twin = type(finished)(tmp_path_factory.mktemp("victim") / "project", finished.environment)
    shutil.copytree(finished.root, twin.root, symlinks=True)
    return twin


@pytest.fixture
def mended(victim: "Project", tmp_path: Path) -> Iterator["Project"]:
    """The same; artifacts and metrics are put back afterwards."""
    for room in ("artifacts", "metrics"):
        shutil.copytree(victim.root / room, tmp_path / room)
    yield victim
    for room in ("artifacts", "metrics"):
        shutil.rmtree(victim.root / room)
        shutil.copytree(tmp_path / room, victim.root / room)


def largest(artifact: Path) -> Path:
    """The file of an artifact that is most likely to be hit: weights, ids, text."""
    return max((p for p in artifact.rglob("*") if p.is_file()), key=lambda p: (p.name != MANIFEST, p.stat().st_size))


def command(project: "Project", stage: str) -> list[str]:
    """What DVC runs."""
    return shlex.split(yaml.safe_load((project.root / "dvc.yaml").read_text())["stages"][stage]["cmd"])


# --- readers


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("artifact", KINDS)
def test_damage_to_any_file_of_any_kind_is_found(mended: "Project", artifact: str, damage: Damage) -> None:
    path = mended.root / artifact
    kind = json.loads((path / MANIFEST).read_text())["kind"]
    files = [p for p in path.rglob("*") if p.is_file()]
    assert path / MANIFEST in files
    for file in files:
        content = file.read_bytes()
        damage(file)
        with pytest.raises(UserError) as error:
            read(path, kind)
        file.write_bytes(content)
        message = str(error.value)
        assert message.startswith(f"{file}: "), message
        assert "`dvc repro` or `snakemake`" in message
        assert "\n" not in message
    read(path, kind)


@pytest.mark.parametrize(("artifact", "stage"), CONSUMERS.items(), ids=CONSUMERS)
def test_a_script_stops_with_one_line(mended: "Project", artifact: str, stage: str) -> None:
    """Kinds of damage take turns, for a script takes seconds to start; the test above has them all."""
    name = list(DAMAGE)[list(CONSUMERS).index(artifact) % len(DAMAGE)]
    file = largest(mended.root / artifact)
    DAMAGE[name](file)
    before = mended.files()
    done = mended.call(*command(mended, stage), check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert errors == done.stderr.splitlines()[-1:], done.stderr
    assert errors[0].startswith(f"error: {file.relative_to(mended.root)}: "), errors
    assert "`dvc repro`" in errors[0]
    assert mended.files() == before, "the script has left something behind"


# --- the engines


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_dvc_repairs_everything_and_trains_nothing(finished: "Project", victim: "Project", damage: Damage) -> None:
    victim.ran()
    for artifact in KINDS:
        damage(largest(victim.root / artifact))
    damage(victim.root / "metrics/fused.json")
    assert victim.files() != finished.files()
    victim.dvc("repro")
    assert victim.files() == finished.files()
    assert victim.ran() == []
    assert victim.changed() == set()


@pytest.mark.parametrize("artifact", ["artifacts/tokens", "artifacts/activations/1"])
def test_dvc_repairs_an_artifact_without_a_manifest(finished: "Project", victim: "Project", artifact: str) -> None:
    (victim.root / artifact / MANIFEST).unlink()
    victim.dvc("repro")
    assert victim.files() == finished.files()
    assert victim.changed() == set()


def test_snakemake_repairs_and_trains_nothing(finished: "Project", victim: "Project") -> None:
    victim.ran()
    flip(largest(victim.root / "artifacts/stacks/1"))
    truncate(victim.root / "artifacts/finetuned/clm" / MANIFEST)
    shutil.rmtree(victim.root / "artifacts/report")
    assert victim.planned() >= {"train_stack_1", "fuse", "fine_tune_clm", "report"}
    victim.snakemake()
    assert victim.files() == finished.files()
    assert victim.ran() == []
    assert victim.changed() == set()
    assert victim.planned() == set()


def test_the_advice_helps_even_where_dvc_sees_nothing(finished: "Project", victim: "Project") -> None:
    """DVC trusts a file whose size and time are as they were; so the advice is to remove the artifact first."""
    file = largest(victim.root / "artifacts/stacks/0")
    times = file.stat()
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert victim.changed() == set()
    done = victim.call(*command(victim, "quantize_trunk_0"), check=False)
    advice = re.search(r"run `(rm -r \S+)`, then `(dvc repro)`", done.stderr)
    assert advice, done.stderr
    for words in advice.groups():
        victim.call(*shlex.split(words))
    assert victim.files() == finished.files()
    assert victim.changed() == set()


# --- the activation store, which lies outside the engines' sight


def shard_of(store: Path) -> Path:
    return store / "c/0/0/0"


def flip_a_row(store: Path) -> None:
    """Flip a bit of the row that training reads first."""
    shape = json.loads((store / "zarr.json").read_text())["shape"]
    project = store.parents[2]
    facts = json.loads((project / "artifacts/activations/1" / MANIFEST).read_text())["facts"]
    samples = shape[0] // facts["variants"]
    (sample, *_), _ = SampleOrder(samples, seed=0, stream="stacks.1").at(0, 1)
    flip(shard_of(store), int(sample) * (facts["seq"] * facts["d_model"] * 2 + 4))


STORE_DAMAGE: dict[str, Damage] = {
    "flipped row": flip_a_row,
    "truncated shard": lambda store: truncate(shard_of(store)),
    "missing shard": lambda store: shard_of(store).unlink(),
    "truncated metadata": lambda store: truncate(store / "zarr.json"),
    "missing store": shutil.rmtree,
}


@pytest.mark.parametrize("damage", STORE_DAMAGE.values(), ids=STORE_DAMAGE)
def test_a_damaged_store_is_remade_by_training(finished: "Project", victim: "Project", damage: Damage) -> None:
    """Without a word to the engines, and with the same weights in the end."""
    (store,) = (p.parent for p in (victim.root / ".stackwise/activations").glob("*/zarr.json"))
    intact = shard_of(store).read_bytes()
    damage(store)
    done = victim.call(*command(victim, "train_stack_1"))
    assert "cached" in done.stderr
    assert shard_of(store).read_bytes() == intact
    assert victim.files() == finished.files()


def test_an_intact_store_is_not_remade(victim: "Project") -> None:
    assert "cached" not in victim.call(*command(victim, "train_stack_1")).stderr


def test_dvc_takes_no_notice_of_a_missing_store(project: "Project") -> None:
    """A stage that DVC runs remakes it too: with another learning rate the weights are the same with and without it."""
    shutil.rmtree(project.root / ".stackwise/activations")
    assert project.changed() == set()
    project.set_param("stacks.1.lr", 1.0e-3)
    project.dvc("repro", "train_stack_1")
    assert project.ran() == ["train_stack_1"]
    without = project.files()
    assert "cached" not in project.call(*command(project, "train_stack_1")).stderr
    assert project.files() == without
