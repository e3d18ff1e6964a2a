"""What the two engines cost beside the work of the stages.

Builds a tiny pipeline in a temporary directory, then measures, in turns, `--rounds` times, taking medians. Run it on an
idle machine:

    python -m benchmarks.orchestration --check

- Nothing to do: `snakemake -n` against 1.5 times `dvc status` plus Snakemake's own start (`snakemake -n` of a workflow
  with one rule that is done).
- A stage: `dvc repro --single-item` of one that has to run, less its script alone; and `snakemake` with that one job,
  less its script alone and less `snakemake -n` with nothing to do.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from stackwise.config.params import load
from stackwise.tracking.record import RECORDS
from workflow.stages import Stage, table

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = (
    *("Snakefile", "workflow", "stackwise", "profiles"),
    *(".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "params.yaml"),
)
STAGE = "fuse"
"""The stage that is timed: a light one, in the middle of the others."""
TARGET_SHARE, TARGET_SECONDS = 1.0, 1.0


class Pipeline:
    """A tiny pipeline in which all is done."""

    def __init__(self, root: Path, stacks: int) -> None:
        self.root = root
        self._environment = os.environ | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(root.with_name("dvc")),
            **{f"GIT_{role}_{what}": "benchmark" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }
        for name in SOURCES:
            source, copy = REPOSITORY / name, root / name
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy)
        params = root / "params.yaml"
        params.write_text(yaml.safe_dump(yaml.safe_load(params.read_text()) | _tiny(stacks), sort_keys=False))
        self.call(sys.executable, "-m", "workflow.stages")
        self.call("git", "init", "--quiet")
        self.call("git", "add", "--all")
        self.call("git", "commit", "--quiet", "--message", "tiny")
        self.call("snakemake", "--cores", str(os.cpu_count() or 1))
        self.stages = {stage.name: stage for stage in table(load(params))}

    def call(self, *command: str, at: Path | None = None) -> float:
        """Run a command; returns its wall time (seconds).

        Raises:
            RuntimeError: it failed.
        """
        began = time.perf_counter()
        done = subprocess.run(command, cwd=at or self.root, env=self._environment, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return seconds

    def records(self) -> list[Path]:
        """What the stages' scripts have left, a file for each time that one ran."""
        return list((self.root / RECORDS).glob("*.jsonl"))

    def lose(self, stage: Stage) -> None:
        """Remove what a stage has made, and DVC's memory of it, so that it has to run."""
        for output in stage.outputs:
            shutil.rmtree(self.root / output)
        shutil.rmtree(self.root / ".dvc/cache/runs", ignore_errors=True)
        lock = self.root / "dvc.lock"
        known = yaml.safe_load(lock.read_text())
        known["stages"].pop(stage.name, None)  # or DVC would put the outputs in place without running it
        lock.write_text(yaml.safe_dump(known, sort_keys=False))


def _tiny(stacks: int) -> dict[str, Any]:
    """Sections of params.yaml with which a stage takes seconds."""
    branch = {"steps": 4, "batch_size": 4}
    return {
        "seq_len": 16,
        "data": {"source": "dummy", "dummy_documents": 40},
        "tokenizer": {"type": "byte", "vocab_size": None},
        "model": {"d_model": 16, "attention": {"n_heads": 2}, "mlp": {"hidden": 32}},
        "n_stacks": stacks,
        "stack": {"blocks": 1, "steps": 4, "batch_size": 4},
        "stacks": [],
        "compute": {"threads": 1},
        "fine_tune": {name: {"objective": name, **branch} for name in ("clm", "mlm", "diffusion")},
        "evaluate": {"samples": 8, "draws": 2, "batch_size": 8},
        "analyse": {"samples": 4},
        "samples": {"number": 1, "steps": 4},
        "export": {},
        "tracking": {"enabled": False},
    }


def measure(pipeline: Pipeline, trivial: Path, rounds: int) -> dict[str, float]:
    """Median wall time of each command (seconds)."""
    stage = pipeline.stages[STAGE]
    trivial.mkdir()
    (trivial / "Snakefile").write_text("rule all:\n    output:\n        'done'\n")
    (trivial / "done").touch()

    def by(*command: str) -> float:
        pipeline.lose(stage)
        ran = len(pipeline.records())
        seconds = pipeline.call(*command)
        assert len(pipeline.records()) == ran + 1, "the stage's script has not run"
        return seconds

    contestants: dict[str, Callable[[], float]] = {
        "dvc status": lambda: pipeline.call("dvc", "status"),
        "snakemake -n, one rule": lambda: pipeline.call("snakemake", "-n", at=trivial),
        "snakemake -n": lambda: pipeline.call("snakemake", "-n"),
        "script": lambda: pipeline.call(*stage.command.split()),
        "dvc repro": lambda: by("dvc", "repro", "--quiet", "--single-item", stage.name),
        "snakemake": lambda: by("snakemake", "--cores", "1", stage.name),
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            seconds = contestant()
            if number:  # the first round fills caches
                found[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.orchestration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stacks", type=int, default=4, help="stacks of the pipeline (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    if options.stacks < 1 or options.rounds < 1:
        parser.error("--stacks and --rounds must be positive")
    with tempfile.TemporaryDirectory(prefix="stackwise-orchestration-") as name:
        pipeline = Pipeline(Path(name) / "project", options.stacks)
        seconds = measure(pipeline, Path(name) / "trivial", options.rounds)
    print(f"{len(pipeline.stages)} stages; stage {STAGE}; medians of {options.rounds} rounds, seconds")
    for name, value in seconds.items():
        print(f"  {name:<28} {value:8.2f}")
    share = seconds["snakemake -n"] / (1.5 * seconds["dvc status"] + seconds["snakemake -n, one rule"])
    by_dvc = seconds["dvc repro"] - seconds["script"]
    by_snakemake = seconds["snakemake"] - seconds["script"] - seconds["snakemake -n"]
    print(f"  {'':<44} {'ratio':>8} {'target':>8}")
    print(f"  {'snakemake -n / (1.5 dvc status + its start)':<44} {share:8.2f} {f'<= {TARGET_SHARE:g}':>8}")
    print(f"  {'':<44} {'seconds':>8} {'target':>8}")
    print(f"  {'a stage: dvc repro less script':<44} {by_dvc:8.2f} {f'<= {TARGET_SECONDS:g}':>8}")
    print(f"  {'a stage: snakemake less script and start':<44} {by_snakemake:8.2f} {f'<= {TARGET_SECONDS:g}':>8}")
    missed = share > TARGET_SHARE or max(by_dvc, by_snakemake) > TARGET_SECONDS
    return int(options.check and missed)


if __name__ == "__main__":
    raise SystemExit(main())
