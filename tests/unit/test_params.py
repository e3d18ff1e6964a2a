"""`params.yaml`: loading, a stage's view, the generated reference, and what files that are wrong lead to."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stackwise.config import schema
from stackwise.config.params import UNTRACKED, Params, load, view
from stackwise.config.section import Section
from stackwise.errors import UserError
from tests.bad_params import CASES, GOOD, Case

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def params(tmp_path: Path) -> Params:
    return written(tmp_path, GOOD)


def written(directory: Path, text: str) -> Params:
    (directory / "params.yaml").write_text(text)
    return load(directory / "params.yaml")


# --- loading


def test_the_projects_own_files_are_valid() -> None:
    for path in (ROOT / "params.yaml", *(ROOT / "configs").glob("**/*.yaml")):
        load(path)


def test_values_and_defaults(params: Params) -> None:
    assert (params.seed, params.stack.lr, params.compute.dtype) == (0, 3e-3, "bf16")
    assert (params.trunk.precision, params.fine_tune["clm"].lora) == ("bfloat16", None)
    assert params.model.attention.n_kv_heads is None


def test_a_file_loads_the_same_whatever_its_layout(tmp_path: Path, params: Params) -> None:
    tree = yaml.safe_load(GOOD)
    assert written(tmp_path, f"# a comment\n\n{yaml.safe_dump(tree, default_flow_style=True)}") == params
    assert written(tmp_path, f"\ufeff{GOOD}") == params  # as some editors begin a file


def test_overrides(tmp_path: Path) -> None:
    params = written(tmp_path, GOOD.replace("stacks: [{}, {}]", "stacks: [{lr: 0.5}, {init: zero, blocks: 3}]"))
    assert (params.stack_params(0).lr, params.stack_params(0).init) == (0.5, "copy")
    assert (params.stack_params(1).lr, params.stack_params(1).init, params.stack_params(1).blocks) == (3e-3, "zero", 3)
    short = written(tmp_path, GOOD.replace("stacks: [{}, {}]", "stacks: []"))
    assert short.stack_params(1) == short.stack


def test_parameters_cannot_be_changed(params: Params) -> None:
    with pytest.raises(ValueError, match="frozen"):
        params.stack.lr = 1.0  # type: ignore[misc]


# --- a stage's view


def test_a_view_has_what_is_declared_and_no_more(params: Params) -> None:
    part = view(params, ("seed", "model", "compute.dtype", "fine_tune.clm"))
    assert (part.seed, part.model, part.compute.dtype) == (0, params.model, "bf16")
    assert part.fine_tune == {"clm": params.fine_tune["clm"]}
    assert all(getattr(part, name) == getattr(params, name) for name in UNTRACKED)
    undeclared = [(part, "stack"), (part, "seq_len"), (part.compute, "threads"), (part.compute, "device")]
    for section, name in undeclared:
        with pytest.raises(AttributeError):
            getattr(section, name)


def test_a_view_shows_one_stacks_overrides_only(tmp_path: Path) -> None:
    params = written(tmp_path, GOOD.replace("stacks: [{}, {}]", "stacks: [{lr: 0.5}, {lr: 0.25}]"))
    part = view(params, ("stack", "stacks.1"))
    assert part.stack_params(1).lr == 0.25
    assert part.stack_params(0).lr == params.stack.lr  # as if it had none
    with pytest.raises(AttributeError):
        view(params, ("stack",)).stack_params(1)


# --- the reference


def test_the_reference_is_current() -> None:
    schema.check(ROOT)


def test_drift_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    schema.check(tmp_path)
    for name in ("params.schema.json", "parameters.md"):
        path = tmp_path / "docs" / name
        text = path.read_text()
        path.write_text(text.replace("Peak learning rate", "Learning rate"))
        with pytest.raises(UserError, match=f"{name}: out of date .* run `python -m stackwise.config.schema`"):
            schema.check(tmp_path)
        path.unlink()
        with pytest.raises(UserError, match=name):
            schema.check(tmp_path)
        path.write_text(text)


def all_sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    for section in base.__subclasses__():
        yield section
        yield from all_sections(section)


def test_everything_has_a_description() -> None:
    reference = schema.reference()
    for section in all_sections():
        assert section.__doc__
        meanings = schema.meanings(section)
        for name in section.model_fields:
            assert meanings.get(name), f"{section.__name__}.{name}"
            assert f".{name}` |" in reference or f"| `{name}` |" in reference


def test_the_schema_knows_what_is_right_and_what_is_wrong() -> None:
    jsonschema: Any = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema.json_schema())
    for text in (GOOD, (ROOT / "params.yaml").read_text()):
        validator.validate(yaml.safe_load(text))
    for name in ("misspelt key", "wrong choice", "exponent without a point", "missing section", "mask range from zero"):
        assert not validator.is_valid(yaml.safe_load(BY_NAME[name].content or b"")), name


# --- files that are wrong


def test_there_are_enough_of_them() -> None:
    assert len(BY_NAME) == len(CASES) >= 30


def project_files(root: Path) -> dict[str, bytes]:
    """All files of a project but those that the engines write for themselves when they start."""
    own = re.compile(r"\.snakemake/|\.dvc/|\.git/|.*__pycache__/")
    paths = (path for path in root.rglob("*") if path.is_file())
    return {name: p.read_bytes() for p in paths if not own.match(name := str(p.relative_to(root)))}


def put(case: Case, root: Path) -> None:
    path = root / "params.yaml"
    path.unlink(missing_ok=True)
    if case.content is not None:
        path.write_bytes(case.content)


def assert_explains(case: Case, said: str) -> None:
    """One message that names the file and everything that is wrong with it."""
    message = said[said.index("error: ") :]
    assert message.startswith("error: params.yaml"), said
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said
    for part in case.says:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_file_stops_a_script(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(case, tmp_path)
    before = project_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_params.py"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "workflow/scripts/check_params.py"), run_name="__main__")
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert not said.out
    assert_explains(case, said.err)
    lines = said.err.splitlines()
    assert len(lines) == (1 if case.problems == 1 else case.problems + 1), said.err
    assert project_files(tmp_path) == before


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which nothing has run."""
    root = tmp_path_factory.mktemp("project")
    for name in ("stackwise", "workflow", "profiles"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    (root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", root / ".dvc/config")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def call(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path, "DVC_NO_ANALYTICS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


OF_ALL_KINDS = ("everything at once", "open bracket", "double key", "no file", "Latin-1")


@pytest.mark.parametrize("name", OF_ALL_KINDS)
@pytest.mark.parametrize(
    "command",
    [
        # A stage that works with torch; its other arguments matter as little as they exist.
        ("python", "workflow/scripts/train_stack.py"),
        ("python", "-m", "workflow.stages"),
        ("snakemake", "--cores", "1"),
    ],
    ids=["script", "stages", "snakemake"],
)
def test_a_bad_file_stops_a_command(project: Path, name: str, command: tuple[str, ...]) -> None:
    case = BY_NAME[name]
    put(case, project)
    before = project_files(project)
    done = call(project, *command)
    assert done.returncode == 1
    assert_explains(case, done.stderr)
    assert project_files(project) == before


def test_scripts_check_before_their_slow_imports(project: Path) -> None:
    put(BY_NAME["misspelt key"], project)
    program = """
import runpy, sys
from pathlib import Path
for path in sorted(Path("workflow/scripts").glob("*.py")):
    sys.argv = [str(path)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        print(path.stem, stop.code, *sorted({"torch", "datasets", "tokenizers", "transformers"} & set(sys.modules)))
"""
    done = call(project, "python", "-c", program)
    names = sorted(path.stem for path in (ROOT / "workflow/scripts").glob("*.py"))
    assert done.stdout.splitlines() == [f"{name} 1" for name in names]


@pytest.mark.parametrize("name", ["everything at once", "misspelt key", "no file", "empty", "double key", "Latin-1"])
def test_a_bad_file_stops_dvc(project: Path, name: str) -> None:
    """DVC reads the file before any script does: it explains itself what it cannot read. It fails with 255."""
    case = BY_NAME[name]
    put(case, project)
    before = project_files(project)
    done = call(project, "dvc", "repro")
    assert done.returncode == 255
    if name in ("no file", "double key", "Latin-1"):
        assert re.search(r"^ERROR: .*'params\.yaml'", done.stderr), done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert_explains(case, done.stderr)
    assert project_files(project) == before


def test_dvc_checks_first_what_it_is_asked_to_make(project: Path) -> None:
    """A target that does not need the stage check_params is checked by its own script."""
    put(BY_NAME["misspelt key"], project)
    done = call(project, "dvc", "repro", "corpus")
    assert done.returncode == 255
    assert_explains(BY_NAME["misspelt key"], done.stderr)
    assert not (project / "artifacts").exists()


def test_snakemake_takes_no_parameters_of_its_own(project: Path) -> None:
    (project / "params.yaml").write_text(GOOD)
    done = call(project, "snakemake", "--cores", "1", "--config", "seed=3")
    assert done.returncode == 1
    assert "error: --config seed: change params.yaml instead" in done.stderr


def test_help_does_not_need_good_parameters(project: Path) -> None:
    put(BY_NAME["no file"], project)
    done = call(project, "python", "workflow/scripts/check_params.py", "--help")
    assert done.returncode == 0
    assert "--params" in done.stdout


def test_the_parameters_are_json(params: Params) -> None:
    json.dumps(params.model_dump(), allow_nan=False)
