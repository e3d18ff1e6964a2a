"""E11: what a script imports, and what it reads of params.yaml, is what the table of stages declares for it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stackwise.config.params import UNTRACKED, Params, load
from workflow.stages import ALL, NEUTRAL, Stage, table

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.stem for p in (ROOT / "workflow/scripts").glob("*.py"))
PARAMS_MODULE = "stackwise/config/params.py"


def full_table() -> list[Stage]:
    """All stages that there can be: with every branch, joint fine-tuning, tied embeddings, overrides."""
    params = load(ROOT / "params.yaml")
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["joint"]["share"] = 0.5
    tree["fine_tune"] = {name: {} for name in type(params.fine_tune).model_fields}
    tree["model"]["tie_embeddings"] = True
    return table(Params.model_validate(tree))


def imports(path: Path) -> Iterator[str]:
    """The modules of this project, packages too, that a source imports anywhere in it, relative to the project."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
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


def closure(script: str) -> set[str]:
    """Every source that a script reaches by imports without passing through a neutral one; packages are left out."""
    found: set[str] = set()
    waiting = [script]
    while waiting:
        for file in imports(ROOT / waiting.pop()):
            if file not in found and not is_within(file, NEUTRAL) and Path(file).name != "__init__.py":
                found.add(file)
                waiting.append(file)
    return found


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
        used = closure(script)
        undeclared = {f"{stage.name} imports {f}" for stage in mine for f in used - files(stage.sources)}
        unused = {f"no use of {f}" for f in files(s for stage in mine for s in stage.sources) - used}
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
