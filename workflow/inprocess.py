"""Stages of a pipeline run one after the other in this process: their own scripts, as the table of stages calls them.

What has run already with the same command, parameters, inputs and code is put back from memory, as DVC would.
"""

import contextlib
import hashlib
import io
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from stackwise.artifacts.code import PROJECT, digest_code
from stackwise.artifacts.manifest import digest_json
from stackwise.config.params import Params, load, view
from stackwise.errors import UserError
from workflow.stage import resolve
from workflow.stages import ALL, Stage, render, table


class Memory:
    """What stages have made, in a directory. A process may be killed at any moment; an entry is whole or not there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def bring(self, stages: Sequence[Stage], params: Params) -> dict[str, str]:
        """Bring some stages up to date in the current directory.

        Args:
            stages: in topological order, with all that they need.
            params: what `params.yaml` says.

        Returns:
            The digest of each output, by path.

        Raises:
            UserError: a stage has failed; with what it said.
        """
        made: dict[str, str] = {}
        for stage in stages:
            entry = self._directory / _key(stage, params, made)[:32]
            for path in outputs(stage):
                remove(Path(path))
            if entry.exists():
                for path in outputs(stage):
                    copy(entry / path, Path(path))
            else:
                call(stage.command)
                self._keep(stage, entry)
            made |= {path: digest(Path(path)) for path in outputs(stage)}
        return made

    def _keep(self, stage: Stage, entry: Path) -> None:
        partial = entry.with_name(f".{entry.name}.{os.getpid()}")
        remove(partial)
        partial.mkdir(parents=True)
        for path in outputs(stage):
            copy(Path(path), partial / path)
        try:
            partial.replace(entry)
        except OSError:  # another process was first
            remove(partial)


def _key(stage: Stage, params: Params, made: dict[str, str]) -> str:
    seen = params if ALL in stage.params else view(params, stage.params)
    inputs = [made.get(path, path) for path in stage.inputs]
    return digest_json([stage.command, resolve(seen), inputs, digest_code((stage.path, *stage.sources))])


def planned(params_file: Path = Path("params.yaml")) -> tuple[Params, list[Stage]]:
    """The parameters and all stages of the project in the current directory, whose `dvc.yaml` is then current."""
    params = load(params_file)
    stages = table(params)
    render(stages)
    return params, stages


def needed(stages: Sequence[Stage], wanted: Callable[[Stage], bool]) -> list[Stage]:
    """The wanted stages with all that they need, in order."""
    found: list[Stage] = []
    inputs: set[str] = set()
    for stage in reversed(stages):
        if wanted(stage) or inputs.intersection(outputs(stage)):
            found.insert(0, stage)
            inputs.update(stage.inputs)
    return found


def call(command: str) -> None:
    """Run a stage's script as its command does.

    Raises:
        UserError: it has failed; with the end of what it said.
    """
    python, script, *arguments = command.split()
    assert python == "python"
    argv, path = sys.argv, sys.path.copy()
    said = io.StringIO()
    try:
        sys.argv = [str(PROJECT / script), *arguments]
        with contextlib.redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        raise UserError(f"{command}\n{said.getvalue()[-3000:]}") from stop
    finally:
        sys.argv, sys.path[:] = argv, path


@contextlib.contextmanager
def inside(root: Path) -> Iterator[None]:
    """`root` is the current directory until the block ends; then what stages have set for the process is undone."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    with contextlib.chdir(root):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads(threads)


def outputs(stage: Stage) -> tuple[str, ...]:
    """All that a stage makes."""
    return (*stage.outputs, *stage.metrics, *stage.plots)


def copy(source: Path, target: Path) -> None:
    """A file or directory, with the directories above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def digest(path: Path) -> str:
    """Of an artifact its manifest's, of another file its own (SHA-256, hex)."""
    file = path / "manifest.json" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()


def remove(path: Path) -> None:
    """A file or directory, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
