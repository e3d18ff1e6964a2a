"""Two engines, one state: what one has done the other finds done; clones, experiments, the number of stacks."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

EVERYTHING = {
    *("check_params", "corpus", "tokenize", "train_stack_0", "evaluate_stack_0"),
    *("quantize_trunk_0", "cache_activations_1", "train_stack_1", "evaluate_stack_1"),
    *("fuse", "evaluate_fused", "fine_tune_clm", "evaluate_clm", "fine_tune_diffusion", "evaluate_diffusion"),
    *("sample_fused", "sample_clm", "sample_diffusion", "score_samples", "analyse", "report"),
}


def test_snakemake_leaves_nothing_to_do_for_either_engine(project: "Project") -> None:
    assert sorted(record[0]["stage"] for record in project.records()) == sorted(EVERYTHING)
    assert project.changed() == set()
    project.dvc("repro")
    assert project.ran() == []
    assert project.planned() == set()
    assert project.planned("fused_model") == set()


def test_a_clone_pulls_what_is_done(project: "Project", tmp_path: Path) -> None:
    project.dvc("remote", "add", "--default", "store", str(tmp_path / "remote"))
    project.dvc("push")
    project.commit("with a remote")
    clone = type(project)(tmp_path / "clone", project.environment)
    project.git("clone", "--quiet", ".", str(clone.root))
    clone.dvc("pull")
    assert clone.changed() == set()
    assert clone.planned() == set()
    assert clone.files() == project.files()

    # The activations are not in the remote: who trains on them makes them again.
    stores = [p.root / ".stackwise/activations" for p in (project, clone)]
    assert not stores[1].exists()
    clone.dvc("repro", "--force", "--single-item", "train_stack_1")
    assert clone.ran() == ["train_stack_1"]
    names, made = ({str(path.relative_to(store)) for path in store.rglob("*")} for store in stores)
    assert names == made
    assert clone.changed() == set()
    assert clone.files() == project.files()


def test_independent_branches_run_at_the_same_time(project: "Project") -> None:
    branches = ["fine_tune_clm", "fine_tune_diffusion"]
    project.set_param("fine_tune.clm.lr", 2.0e-3)
    project.set_param("fine_tune.diffusion.lr", 2.0e-3)
    # Each is held at its first step until both are there: one after the other they would never come to it.
    at = dict.fromkeys(branches, ("call", "stackwise/training/loop.py:_step", 1))
    with project.held("snakemake", "--cores", "2", *branches, at=at) as both:
        both.go_on()
    assert project.ran() == branches
    times = sorted((record[0]["time"], record[-1]["time"]) for record in project.records()[-2:])
    (_, first_end), (second_start, _) = times
    assert second_start < first_end


def test_experiments(project: "Project") -> None:
    branch = ["analyse", "check_params", "evaluate_clm", "fine_tune_clm", "report", "sample_clm", "score_samples"]
    project.dvc("exp", "run", "--set-param", "fine_tune.clm.lr=2e-3")
    assert project.ran() == branch
    assert project.planned() == set()
    assert "0.002" in project.dvc("exp", "diff")

    files = project.files()
    refused = project.call("dvc", "exp", "run", "--set-param", "fine_tune.clm.lr=-1", check=False)
    assert refused.returncode
    assert "fine_tune.clm.lr = -1: expected" in refused.stderr
    assert project.ran() == []
    assert project.files() == files


def test_the_number_of_stacks_is_a_parameter(project: "Project") -> None:
    two = project.files()
    project.set_param("n_stacks", 3)
    stale = project.call("dvc", "repro", check=False)
    assert stale.returncode
    assert "python -m workflow.stages" in stale.stderr
    assert project.ran() == []
    assert project.files() == two

    third = {
        *("check_params", "quantize_trunk_1", "cache_activations_2", "train_stack_2", "evaluate_stack_2"),
        *("fuse", "evaluate_fused", "fine_tune_clm", "evaluate_clm", "fine_tune_diffusion", "evaluate_diffusion"),
        *("sample_fused", "sample_clm", "sample_diffusion", "score_samples", "analyse", "report"),
    }
    assert project.planned() == third
    project.git("checkout", "dvc.yaml")  # which Snakemake has rendered
    project.call("python", "-m", "workflow.stages")
    project.dvc("repro")
    assert project.ran() == sorted(third)
    assert project.planned() == set()

    project.set_param("n_stacks", 2)
    project.snakemake()
    assert project.ran() == ["check_params"]
    assert project.changed() == set()
    files = project.files()
    assert {path: files[path] for path in two} == two
