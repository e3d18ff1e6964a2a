"""Every command of README and docs/ runs, page by page, in a tiny project that has been through the pipeline.

A line of a `bash` block is a command. Two comments before a block change that:

    <!-- not run: why -->                      its commands are only parsed
    <!-- not run: why; instead: COMMAND -->     this one runs in their place

A `yaml` block that begins with `# params.yaml` is put into params.yaml for the rest of its page.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from stackwise.config.params import load
from tests.conftest import COVERED
from tests.pipeline.conftest import REPOSITORY, Project

PAGES = ("README.md", *sorted(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").rglob("*.md")))
MOST_NOT_RUN = 14
"""Commands that are only parsed: servers, clusters, what makes environments, and what trains for minutes."""
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^;\n]+?)(?:; instead: (?P<instead>.+?))? -->\n)?"
    r"^```(?P<language>bash|yaml)\n(?P<body>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    body: str
    why: str | None
    """Why its commands do not run."""
    instead: str | None

    @property
    def commands(self) -> list[str]:
        """Each command, its continued lines joined, without comments."""
        lines = re.sub(r"\\\n\s*", "", self.body).splitlines()
        return [line for line in (re.sub(r"(^|\s+)#\s.*$", "", line).strip() for line in lines) if line]


def blocks(page: str) -> Iterator[Block]:
    """All `bash` and `yaml` blocks of a page, in order."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("body")) + 1
        yield Block(page, line, found["language"], found["body"], found["why"], found["instead"])


@pytest.fixture(scope="module")
def reader(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A reader's clone, in which everything has run and has been committed, with its models registered."""
    root = tmp_path_factory.mktemp("reader") / "project"
    shutil.copytree(finished.root, root, symlinks=True)
    shutil.copytree(REPOSITORY / "docs", root / "docs", ignore=shutil.ignore_patterns("generated"))
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    shutil.copy(REPOSITORY / "README.md", root)
    project = Project(root, finished.environment)
    command = root.parent / "bin/stackwise"  # of this project; the installed one is that of the repository
    command.parent.mkdir()
    python = shutil.which("python", path=project.environment["PATH"])
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec {python} -m workflow.command "$@"\n')
    command.chmod(0o755)
    project.environment = {
        **project.environment,
        "PATH": f"{command.parent}:{project.environment['PATH']}",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    project.commit("docs")
    track(project)
    return project


def track(project: Project) -> None:
    """Feed a store from the records, which say that no one should: the tests' pipelines are not tracked."""
    records = sorted((project.root / ".stackwise/records").glob("*.jsonl"))
    for record in records:
        record.write_text(record.read_text().replace('"tracking": {"enabled": false', '"tracking": {"enabled": true'))
    code = "from stackwise.tracking import follow; follow.IDLE = follow.POLL = 0.2; follow.main()"
    project.call("python", "-c", code)


def test_commands(reader: Project, record_property: Callable[[str, object], None]) -> None:
    """One test for all pages: a command that has run on the same parameters does not run again."""
    seen: set[tuple[str, str]] = set()
    for page in PAGES:
        if ran := run_page(page, reader, seen):
            record_property(COVERED, f"{page:<40} {ran:>2} commands ran")
    assert len(seen) > 30


def run_page(page: str, reader: Project, seen: set[tuple[str, str]]) -> int:
    """Run the commands of a page, but for those seen before; says how many."""
    shipped, ran = reader.params.read_text(), 0
    try:
        for block in blocks(page):
            if block.language == "yaml":
                if block.body.startswith("# params.yaml"):
                    into(reader.params, yaml.safe_load(block.body))
                continue
            subprocess.run(["bash", "-n", "-c", block.body], check=True)
            commands = [block.instead] if block.instead else [] if block.why else block.commands
            for command in commands:
                key = (command, reader.params.read_text())
                if key in seen:
                    continue
                seen.add(key)
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", command],
                    cwd=reader.root, env=reader.environment, capture_output=True, text=True,
                )  # fmt: skip
                said = f"{done.stdout[-1500:]}{done.stderr[-3000:]}"
                assert done.returncode == 0, f"{page}:{block.line}: {command}\nended with {done.returncode}:\n{said}"
                ran += 1
    finally:
        if reader.params.read_text() != shipped:
            reader.params.write_text(shipped)
            reader.call("python", "-m", "workflow.stages")
    return ran


def into(params: Path, change: dict[str, Any]) -> None:
    """Put sections into a params file: a section that is there gets the keys of the change."""
    tree = yaml.safe_load(params.read_text())
    params.write_text(yaml.safe_dump(merged(tree, change), sort_keys=False))


def merged(old: Any, new: Any) -> Any:
    """`new` over `old`, key by key."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}
    return new


def test_parameters_are_valid_as_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `# params.yaml` block by itself with the parameters that people have in their clone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text("text\n")
    (tmp_path / "tokenizers/mine").mkdir(parents=True)
    checked = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml" and block.body.startswith("# params.yaml"):
                (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
                into(tmp_path / "params.yaml", yaml.safe_load(block.body))
                load(tmp_path / "params.yaml")
                checked += 1
    assert checked > 3


def test_few_commands_do_not_run() -> None:
    left_out = [
        f"{block.page}:{block.line}: {block.why}"
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash" and block.why and not block.instead
    ]
    assert len(left_out) <= MOST_NOT_RUN, "\n".join(left_out)


def test_no_command_hides_in_a_block_without_a_language() -> None:
    """What looks like one of our commands stands in a `bash` block."""
    plain = re.compile(r"^```(?:\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    of_us = re.compile(r"^(?:snakemake|dvc|stackwise|mlflow|make|python -m) ", re.MULTILINE)
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for found in plain.finditer(text):
            opened = text[found.start() : found.start(1)]
            line = text.count("\n", 0, found.start()) + 1
            assert "bash" in opened or not of_us.search(found[1]), f"{page}:{line}: put the commands into a bash block"
