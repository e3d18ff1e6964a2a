"""A tiny pipeline in a directory of its own, and what the tests ask of it.

What ran is read from the records that the stages write themselves, never from an engine's log.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from stackwise.tracking.record import RECORDS, read_record

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = (
    *("Snakefile", "workflow", "stackwise", "profiles"),
    *(".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "params.yaml"),
)
TINY: dict[str, Any] = {
    "seq_len": 16,
    "data": {"source": "dummy", "dummy_documents": 12},
    "tokenizer": {"type": "byte", "vocab_size": None},
    "model": {"d_model": 16, "attention": {"n_heads": 2}, "mlp": {"hidden": 32}},
    "n_stacks": 2,
    "stack": {"blocks": 1, "steps": 20, "batch_size": 4, "lr": 3.0e-3},
    "stacks": [{}, {}],
    "compute": {"dtype": "bf16", "threads": 1, "branch_threads": 1},
    "fine_tune": {
        "clm": {"objective": "clm", "steps": 8, "batch_size": 4, "lr": 1.0e-3},
        "diffusion": {"objective": "diffusion", "steps": 8, "batch_size": 4, "lr": 1.0e-3},
    },
    "evaluate": {"samples": 8, "draws": 2, "batch_size": 8},
    "analyse": {"samples": 4, "tokens": 8, "heads": 2},
    "samples": {"number": 1, "steps": 4},
    "export": {},
    "checkpoint": {"every": 5},
    "tracking": {"enabled": False},
}
"""Replaces these sections of params.yaml: seconds of work a stage, nearly all of it imports."""
PATIENCE = 300.0
"""Seconds after which a stage that does not come to the point where it is awaited is given up."""

Point = tuple[str, str, int]
"""Where a script is held: event, pattern and count, see hook/sitecustomize.py."""


@dataclass
class Held:
    """An engine at work, with one or more scripts that are held."""

    engine: "subprocess.Popen[str]"
    scripts: Mapping[str, int]
    """Process id by stage."""
    marks: Path

    def kill(self, *, everything: bool) -> None:
        """kill -9 of the scripts, or of the engine's whole process group, of which they must be."""
        for pid in self.scripts.values():
            assert os.getpgid(pid) == self.engine.pid
            if not everything:
                os.kill(pid, signal.SIGKILL)
        if everything:
            os.killpg(self.engine.pid, signal.SIGKILL)
        assert self.engine.wait() != 0
        while everything and _is_there(self.engine.pid):  # the dead, too, until the system has cleared them away
            time.sleep(0.02)

    def go_on(self) -> None:
        """Let them finish."""
        (self.marks / "go").touch()
        assert self.engine.wait() == 0


@dataclass
class Project:
    """A directory with a pipeline."""

    root: Path
    environment: dict[str, str]
    _seen: set[Path] = field(default_factory=set)

    # --- commands

    def call(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command here; a failure is an error unless `check` is false."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        said = f"{done.stdout[-3000:]}{done.stderr[-6000:]}"
        assert not (check and done.returncode), f"{' '.join(command)} ended with {done.returncode}:\n{said}"
        return done

    def snakemake(self, *arguments: str) -> None:
        self.call("snakemake", "--cores", "2", *arguments)

    def dvc(self, *arguments: str) -> str:
        return self.call("dvc", *arguments).stdout

    def git(self, *arguments: str) -> str:
        return self.call("git", *arguments).stdout

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def engine(self, name: str) -> None:
        """Bring everything up to date with one of the two engines."""
        if name == "snakemake":
            self.snakemake()
        else:
            self.dvc("repro")

    @contextmanager
    def held(self, *command: str, at: Mapping[str, Point]) -> Iterator[Held]:
        """Run a command until the scripts of all stages in `at` are held there; nothing of it is left afterwards."""
        marks = self.root.with_name(f"{self.root.name}.marks")
        shutil.rmtree(marks, ignore_errors=True)
        marks.mkdir()
        environment = self.environment | {
            "PYTHONPATH": str(Path(__file__).with_name("hook")),
            "HOLD": json.dumps({"stages": at, "marks": str(marks)}),
        }
        with (marks / "output").open("w+") as output:
            engine = subprocess.Popen(
                command,
                cwd=self.root,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                text=True,
            )
            try:
                give_up = time.monotonic() + PATIENCE
                while not all((marks / stage).exists() for stage in at):
                    reason = "ended" if engine.poll() is not None else "hangs" if time.monotonic() > give_up else ""
                    said = (marks / "output").read_text()[-6000:] if reason else ""
                    assert not reason, f"{' '.join(command)} {reason} before {', '.join(at)} is at {at}:\n{said}"
                    time.sleep(0.02)
                yield Held(engine, {stage: int((marks / stage).read_text()) for stage in at}, marks)
            finally:
                if engine.poll() is None:
                    os.killpg(engine.pid, signal.SIGKILL)
                    engine.wait()

    # --- parameters

    def set_param(self, key: str, value: object) -> None:
        """Change a parameter, by its dotted name."""
        tree = node = yaml.safe_load(self.params.read_text())
        *parents, last = key.split(".")
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node[parent]
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
        self.params.write_text(yaml.safe_dump(tree, sort_keys=False))

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    # --- what is so

    def records(self) -> list[list[dict[str, Any]]]:
        """The records of all executions, oldest first."""
        return [read_record(path) for path in sorted((self.root / RECORDS).glob("*.jsonl"))]

    def ran(self) -> list[str]:
        """The stages whose scripts have begun since this was asked last, sorted."""
        new = set((self.root / RECORDS).glob("*.jsonl")) - self._seen
        self._seen |= new
        return sorted(read_record(path)[0]["stage"] for path in new)

    def planned(self, *targets: str) -> set[str]:
        """What Snakemake would run. Nothing means that `dvc status` is clean, too: that is what Snakemake asks."""
        said = self.call("snakemake", "--dry-run", *targets).stdout
        if "Nothing to be done" in said:
            return set()
        table = re.search(r"^Job stats:\n(.*?)^total", said, re.DOTALL | re.MULTILINE)
        assert table, said
        return set(re.findall(r"^(\w+) +\d+$", table[1], re.MULTILINE)) - {"all", "fused_model"}

    def changed(self) -> set[str]:
        """The stages that `dvc status` names."""
        return set(json.loads(self.dvc("status", "--json")))

    def files(self) -> dict[str, str]:
        """SHA-256 of every file of every artifact and metric, by path; a file that is half-written counts too."""
        paths = (path for room in ("artifacts", "metrics") for path in (self.root / room).rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
            if path.name != ".gitignore"  # DVC's
        }


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the engines run in: nothing of the user's own settings, nothing left behind on the machine."""
    foreign = re.compile(r"DVC_|GIT_|MLFLOW_|SNAKEMAKE_|PYTHONPATH$|HOLD$")
    home = tmp_path_factory.mktemp("home")
    return {name: value for name, value in os.environ.items() if not foreign.match(name)} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_NO_ANALYTICS": "1",
        **{f"DVC_{name}": str(home / name) for name in ("SITE_CACHE_DIR", "GLOBAL_CONFIG_DIR", "SYSTEM_CONFIG_DIR")},
        **{"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        **{f"GIT_{role}_NAME": "Tester" for role in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{role}_EMAIL": "tester@example.org" for role in ("AUTHOR", "COMMITTER")},
    }


@pytest.fixture(scope="session")
def unbuilt(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Project:
    """The tiny pipeline, committed, of which nothing has run; copy it before you touch it."""
    project = Project(tmp_path_factory.mktemp("unbuilt"), environment)
    for name in SOURCES:
        source, copy = REPOSITORY / name, project.root / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    project.params.write_text(yaml.safe_dump(yaml.safe_load(project.params.read_text()) | TINY, sort_keys=False))
    project.call(sys.executable, "-m", "workflow.stages")
    project.git("init", "--quiet")
    project.commit("unbuilt")
    return project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, unbuilt: Project) -> Project:
    """The same after one uninterrupted `snakemake --cores 2`, committed; copy it before you touch it.

    Processes that share the tests among them share this, too: the first that needs it makes it.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    project = Project(session / "finished", unbuilt.environment)
    with (session / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not project.root.exists():
            partial = Project(session / "finished.partial", unbuilt.environment)
            shutil.copytree(unbuilt.root, partial.root, symlinks=True)
            partial.snakemake()
            partial.commit("finished")
            partial.root.rename(project.root)
    project.ran()
    return project


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Project], Project]:
    """Makes a copy of a project that a test may do with as it likes."""

    def make(project: Project) -> Project:
        twin = Project(tmp_path / "project", project.environment)
        shutil.copytree(project.root, twin.root, symlinks=True)
        twin.ran()
        return twin

    return make


@pytest.fixture
def project(finished: Project, copy: Callable[[Project], Project]) -> Project:
    """A finished project of the test's own."""
    return copy(finished)
