"""What a change reruns: the least that it must, the same under both engines, and nothing where nothing has changed."""

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from stackwise.config.params import load, view
from workflow.stage import resolve
from workflow.stages import ALL, table

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

# check_params reads the whole file, so it stands in every set: any change of a value has to be checked.
CHECK = {"check_params"}
REPORT = CHECK | {"report"}
CLM = REPORT | {"fine_tune_clm", "evaluate_clm", "sample_clm", "analyse", "score_samples"}
DIFFUSION = REPORT | {"fine_tune_diffusion", "evaluate_diffusion", "sample_diffusion", "score_samples"}
EVALUATIONS = REPORT | {
    *("evaluate_stack_0", "evaluate_stack_1", "evaluate_fused", "evaluate_clm", "evaluate_diffusion")
}
FUSED = CLM | DIFFUSION | {"fuse", "evaluate_fused", "sample_fused"}
STACK_1 = FUSED | {"train_stack_1", "evaluate_stack_1"}
TRUNK = STACK_1 | {"quantize_trunk_0", "cache_activations_1"}
STACK_0 = TRUNK | {"train_stack_0", "evaluate_stack_0"}
TOKENS = STACK_0 | {"tokenize"}
CORPUS = TOKENS | {"corpus"}

CHANGES: list[tuple[str, Any, set[str]]] = [
    ("seed", 1, CORPUS),
    ("data.dummy_documents", 13, CORPUS),
    ("tokenizer.type", "char", TOKENS),
    ("seq_len", 32, STACK_0),
    ("model.mlp.hidden", 48, STACK_0),
    ("objective.mask_max", 0.8, STACK_0),
    ("optimizer.weight_decay", 0.2, STACK_0),
    ("compute.dtype", "fp32", STACK_0),
    ("stack.lr", 2.0e-3, STACK_0),
    ("stacks.0", {"lr": 2.0e-3}, STACK_0),
    ("stacks.1", {"lr": 2.0e-3}, STACK_1),
    ("trunk.precision", "half", TRUNK),
    ("growth.masks", "redraw", STACK_0),
    ("growth.window", 1, STACK_1),
    ("adapters.stack", {"rank": 2}, STACK_1),
    ("joint.lr", 2.0e-3, CHECK),
    ("joint.share", 0.5, CLM | DIFFUSION | {"tune_jointly", "evaluate_fused", "sample_fused"}),
    ("fine_tune.clm.lr", 2.0e-3, CLM),
    ("fine_tune.diffusion.steps", 9, DIFFUSION),
    (
        "fine_tune.mlm",
        {"objective": "mlm", "steps": 8, "batch_size": 4},
        REPORT | {"fine_tune_mlm", "evaluate_mlm", "sample_mlm", "score_samples"},
    ),
    ("evaluate.draws", 4, EVALUATIONS),
    ("samples.steps", 5, REPORT | {"sample_fused", "sample_diffusion", "score_samples"}),
    ("samples.top_k", 5, REPORT | {"sample_fused", "sample_clm", "sample_diffusion", "score_samples"}),
    ("checkpoint.every", 6, CHECK),
    ("activations.budget_gb", 49.0, CHECK),
    ("stacks", [{}, {}, {}], CHECK),
    ("stacks", [{}], STACK_1),  # an entry less, and a key less: DVC by itself would not notice
    ("compute", {"dtype": "bf16", "branch_threads": 1}, STACK_0),
]


def test_a_changed_parameter_plans_what_depends_on_it(project: "Project") -> None:
    original = project.params.read_text()
    planned = []
    for key, value, _ in CHANGES:
        project.set_param(key, value)
        planned.append((key, value, project.planned()))
        project.params.write_text(original)
    (project.root / "text.txt").write_text("A text of the user's own.\n")
    project.set_param("data", {"source": "files", "files": ["*.txt"]})
    planned.append(("data", "files", project.planned()))
    project.params.write_text(original)
    assert planned == [*CHANGES, ("data", "files", CORPUS)]
    assert project.planned() == set()
    assert project.ran() == []


def test_an_artifact_depends_on_what_its_stage_declares_alone(project: "Project") -> None:
    """Or else what a pipeline makes would depend on its history: on what was in params.yaml when a stage last ran."""

    def views() -> dict[str, Any]:
        params = load(project.params)
        stages = {stage.name: stage for stage in table(params)}
        return {name: resolve(view(params, stage.params)) for name, stage in stages.items() if ALL not in stage.params}

    original, before = project.params.read_text(), views()
    for key, value, expected in CHANGES:
        project.set_param(key, value)
        after = views()
        kept = before.keys() & after.keys() - expected
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}, key
        project.params.write_text(original)


def test_changed_put_back_and_checked_out(project: "Project") -> None:
    old = project.files()

    # The same set really runs under both engines; each finds done what the other has done.
    for value, engine in ((2.0e-3, "snakemake"), (3.0e-3, "dvc")):
        project.set_param("fine_tune.clm.lr", value)
        project.engine(engine)
        assert project.ran() == sorted(CLM), engine
        assert project.planned() == set()
    project.commit("later")
    later = project.files()
    assert later != old

    # Put back: restored, not run, under both engines.
    for value, engine, files in ((1.0e-3, "dvc", old), (3.0e-3, "snakemake", later)):
        project.set_param("fine_tune.clm.lr", value)
        project.engine(engine)
        assert project.ran() == sorted(CHECK), engine
        assert project.files() == files
        assert project.planned() == set()
    project.git("checkout", "--quiet", ".")

    # Back in history and forth again.
    for commit, files in (("HEAD^", old), ("-", later)):
        project.git("checkout", "--quiet", commit)
        project.dvc("checkout")
        assert project.files() == files
        assert project.planned() == set()
        project.dvc("repro")
        assert project.ran() == []


def test_what_changes_no_value_reruns_nothing(project: "Project") -> None:
    for path in (project.params, *project.root.glob("workflow/scripts/*.py"), *project.root.glob("stackwise/**/*.py")):
        path.touch()
    text = project.params.read_text()
    assert "seq_len: 16\n" in text
    project.params.write_text("# a comment\n\n" + text.replace("seq_len: 16\n", "seq_len:   16  # so long\n\n"))
    assert yaml.safe_load(project.params.read_text()) == yaml.safe_load(text)
    assert project.planned() == set()
    project.dvc("repro")
    assert project.ran() == []


@pytest.mark.parametrize("engine", ["snakemake", "dvc"])
def test_an_equal_output_stops_there(project: "Project", engine: str) -> None:
    files = project.files()
    fuse = project.root / "workflow/scripts/fuse.py"
    fuse.write_text(fuse.read_text() + "# a comment\n")
    project.engine(engine)
    assert project.ran() == ["fuse"]
    assert project.files() == files
    assert project.planned() == set()
