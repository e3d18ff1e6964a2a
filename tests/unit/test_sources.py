"""E11: what a script imports, and what it reads of params.yaml, is what the table of stages declares for it."""

import ast
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

from stackwise import variants
from stackwise.config.params import UNTRACKED, Params
from workflow.stages import ALL, NEUTRAL, Stage, table

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.stem for p in (ROOT / "workflow/scripts").glob("*.py"))
PUBLISHING = "stackwise/artifacts/manifest.py"
REGISTRY = "stackwise/model/parts.py"
VARIANT = re.compile("stackwise/(attention|mlp)/")


@cache
def full_params() -> Params:
    """With every branch, joint fine-tuning, pretrained and tied embeddings, and a stack for each architecture."""
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["joint"]["share"] = 0.5
    tree["fine_tune"] = {name: {"objective": name} for name in ("clm", "mlm", "diffusion")}
    own = {"format": "sequence_labels", "dataset": "some/set"}
    tree["fine_tune"]["classes"] = {"objective": "classification", "data": own}
    tree["model"] |= {"tie_embeddings": True, "embeddings": {"source": "some/model"}}
    tree["evaluate"]["choices"] = [{"file": "some/choices.jsonl"}]
    tree["tokenizer"] = {"type": "pretrained", "vocab_size": None}
    attention: list[dict[str, object]] = [
        {"type": "standard"},
        {"type": "mla", "mla_rkv": 8},
        {"type": "kernel"},
        {"type": "mlgka", "mla_rkv": 8, "n_kv_heads": 2},
        {"type": "gqa", "n_kv_heads": 2},
    ]
    tree["stacks"] = [{"attention": a, "init": "random"} for a in attention]
    tree["stacks"][4]["mlp"] = {"type": "moe"}
    tree["n_stacks"] = len(attention)
    tree["export"] = {"models": ["fused", "clm", "mlm", "diffusion"]}
    # Together they cannot be; each makes stages read what they do not read otherwise.
    tree["objective"]["schedule"] = "linear"
    tree["model"]["time"] = {"sampling": "batch"}
    assert {a["type"] for a in attention} == set(variants.ATTENTION)
    return Params.model_validate(tree)


def full_table() -> list[Stage]:
    """All stages of a rack that is appended to, and the one that brings its stacks from another model."""
    tree = full_params().model_dump()
    tree["growth"] |= {"start": "some/model", "start_stacks": tree["n_stacks"]}
    importing = [stage for stage in table(Params.model_validate(tree)) if stage.script == "import_stacks"]
    assert importing
    return [*table(full_params()), *importing]


@cache
def every_stage() -> list[Stage]:
    """Those of other ways to grow too: each makes stages read what they do not read otherwise."""
    qlora = {"trunk_strategy": "qlora", "cache_activations": False}
    ways: list[tuple[dict[str, object], dict[str, object]]] = [
        ({"window": 1}, {}),
        ({"window": 1, **qlora}, {"stack": {}, "trunk": {}}),
        ({"building_mode": "prepend", "consistency": 0.5}, {}),
        ({"sweeps": 1}, {}),
    ]
    found = full_table()
    for growth, adapters in ways:
        tree = full_params().model_dump()
        tree |= {"growth": growth, "adapters": adapters}
        tree["model"]["time"] = {"mode": "depth"}
        found = [*found, *table(Params.model_validate(tree))]
    return found


@cache
def architectures(name: str) -> set[str]:
    """The sources of the variants in the stacks that a stage builds."""
    last = full_params().n_stacks - 1
    found = re.fullmatch(r"(train_stack|quantize_trunk|cache_activations|evaluate_stack)_(\d)", name)
    k = int(found[2]) if found else last
    first = k if name.startswith("quantize") else 0
    until = k - 1 if name.startswith("cache") else k
    models = [full_params().stack_model(i) for i in range(first, until + 1)]
    attention = {variants.ATTENTION[m.attention.type].module for m in models}
    mlp = {variants.MLP[m.mlp.type].module for m in models}
    files = {f"stackwise/attention/{m}.py" for m in attention} | {f"stackwise/mlp/{m}.py" for m in mlp}
    return files | {source for file in files for source in closure(file)}


@cache
def imports(source: str) -> frozenset[str]:
    """The modules of this project, packages too, that a source imports anywhere in it."""
    return frozenset(_imports(source))


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / source).read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}: relative import"
            # A name that is imported from a package may be a module.
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] in ("stackwise", "workflow"):
                for n in range(1, len(parts) + 1):
                    base = ROOT.joinpath(*parts[:n])
                    for file in (base.with_suffix(".py"), base / "__init__.py"):
                        if file.is_file():
                            yield str(file.relative_to(ROOT))


def is_within(file: str, sources: Iterable[str]) -> bool:
    return any(file == source or file.startswith(f"{source}/") for source in sources)


@cache
def closure(script: str) -> frozenset[str]:
    """Every source that a script reaches by imports without passing through a neutral one; packages are left out."""
    # Publishing goes through a neutral module, but gives every artifact its form.
    found = {PUBLISHING} if ".publish(" in (ROOT / script).read_text() else set()
    waiting = [script, *found]
    while waiting:
        for file in imports(waiting.pop()):
            if file not in found and not is_within(file, NEUTRAL) and Path(file).name != "__init__.py":
                found.add(file)
                waiting.append(file)
    return frozenset(found)


def files(sources: Iterable[str]) -> set[str]:
    """All sources within files and directories."""
    found: set[str] = set()
    for source in sources:
        path = ROOT / source
        assert path.exists(), f"{source}: declared, but not there"
        members = path.rglob("*.py") if path.is_dir() else [path]
        found |= {str(p.relative_to(ROOT)) for p in members if p.name != "__init__.py"}
    return found


def wrongly_declared(stages: list[Stage]) -> dict[str, set[str]]:
    """For each script that is declared wrongly: sources that it imports undeclared, or declares without a use."""
    wrong = {}
    for script in sorted({stage.path for stage in stages}):
        mine = [stage for stage in stages if stage.path == script]
        used = {stage.name: closure(script) for stage in mine}
        for stage in mine:
            if REGISTRY in used[stage.name]:
                used[stage.name] |= architectures(stage.name)
        undeclared = {f"{s.name} imports {f}" for s in mine for f in used[s.name] - files(s.sources)}
        everything = set().union(*used.values())
        unused = {f"no use of {f}" for f in files(s for stage in mine for s in stage.sources) - everything}
        unused |= {
            f"{s.name}: no use of {f}" for s in mine for f in files(s.sources) - used[s.name] if VARIANT.match(f)
        }
        if any(ALL in stage.params for stage in mine):  # the definitions themselves are what it checks
            unused = set()
        if undeclared or unused:
            wrong[script] = undeclared | unused
    return wrong


def test_scripts_import_what_is_declared() -> None:
    assert wrongly_declared(full_table()) == {}


def test_a_missing_declaration_is_found() -> None:
    """Every declared module and directory, removed from its stage, is missed."""
    removals = 0
    for stage in {stage.script: stage for stage in full_table() if ALL not in stage.params}.values():
        for source in stage.dependencies:
            if source in stage.sources:
                short = replace(stage, sources=tuple(s for s in stage.sources if s != source))
                assert any("imports" in line for line in wrongly_declared([short])[stage.path]), (stage.name, source)
                removals += 1
    assert removals > 50


def test_a_superfluous_declaration_is_found() -> None:
    stage = next(stage for stage in full_table() if stage.script == "quantize_trunk")
    more = replace(stage, sources=(*stage.sources, "stackwise/inference"))
    assert any("no use of stackwise/inference" in line for line in wrongly_declared([more])[stage.path])


def test_packages_hold_nothing_but_their_docstring() -> None:
    """So nothing is lost when they are left out of the closure."""
    for room in ("stackwise", "workflow"):
        for path in (ROOT / room).rglob("__init__.py"):
            body = ast.parse(path.read_bytes()).body
            assert len(body) == 1, path
            assert isinstance(body[0], ast.Expr), path


def test_the_library_knows_nothing_of_the_pipeline() -> None:
    for path in (ROOT / "stackwise").rglob("*.py"):
        source = str(path.relative_to(ROOT))
        assert not [file for file in imports(source) if file.startswith("workflow/")], source


# --- parameters


def sections_read(script: str) -> set[str]:
    """The sections of params.yaml that a script reads, itself or in a module that it hands all its parameters to."""
    known = {*Params.model_fields, "stack_params", "stack_model"}
    found = set()
    for file in {script, *closure(script)}:
        tree = ast.parse((ROOT / file).read_bytes())
        names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
        if names & {"Params", "StageRun"}:
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and node.attr in known and _is_params(node.value):
                    found.add(node.attr)
    ways = {"stack_params": {"stack", "stacks"}, "stack_model": {"model", "stacks"}}
    return (found - set(ways)).union(*(sections for way, sections in ways.items() if way in found))


def _is_params(node: ast.expr) -> bool:
    """Whether an expression is called `params`, be it as an attribute."""
    return getattr(node, "id", getattr(node, "attr", "")) == "params"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_read_the_sections_that_are_declared(script: str) -> None:
    mine = [stage for stage in every_stage() if stage.script == script]
    declared = {key.split(".")[0] for stage in mine for key in stage.params}
    if declared == {ALL}:
        return
    assert sections_read(f"workflow/scripts/{script}.py") - set(UNTRACKED) == declared


# --- scripts


def test_every_script_is_in_the_table() -> None:
    assert sorted({stage.script for stage in full_table()}) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It tells what the stage does, and of every argument that the table gives to it."""
    path = ROOT / f"workflow/scripts/{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert str(ast.get_docstring(ast.parse(path.read_bytes()))) in said
    flags = {flag for stage in every_stage() if stage.script == script for flag in stage.arguments}
    assert all(re.search(rf"^  --{flag} .*\w", said, re.MULTILINE) for flag in flags), said
