"""Stack-wise training against tuned end-to-end training of the same rack: quality at equal operations, and memory.

Every run is the real pipeline: the stages' own scripts, in this process, on real text. The ways of training ("arms")
have the same floating-point operations to spend, of everything that trains the rack: gradients, passes of the trunk
that make cached activations, and what activation checkpointing computes again. One step of each phase is measured, its
operations by counting and its memory by following every tensor, and the budget gives the number of steps.

    python -m benchmarks.quality --check

- Tuning: every arm has the same grid of learning rates and batch sizes, at a seed of its own; the best NELBO counts.
- Comparison: other seeds at that setting. A seed draws the split of the text too, so arms are compared seed by seed;
  the interval is Student's.
- Memory: the most bytes of weights, gradients, optimizer states, activations and batches in any training step of any
  phase. All arms, end to end as well, take their steps in micro-batches of the same size.
- What is done is kept in `--dir` and not done again, however often the benchmark is interrupted.

It takes about seven hours on one core, with `--jobs 2` half of that on two; `--quick` shows some arms with a tenth of
the operations in ten minutes.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from benchmarks.meter import Meter
from benchmarks.table import Line, report
from stackwise.artifacts.code import PROJECT, digest_code
from stackwise.artifacts.manifest import digest_json, read
from stackwise.config.params import UNTRACKED
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.errors import UserError
from stackwise.growth.phases import Phase, phases
from stackwise.training.loop import Run, Watcher
from stackwise.training.loop import train as train_unmetered
from workflow.inprocess import Memory, call, inside, needed, planned, remove
from workflow.stages import Stage

Changes = Mapping[str, Any]
"""Values by dotted path of params.yaml."""

MICRO_BATCH = 4
"""Samples that are in memory at once, whatever the batch size."""
THREADS = 1
LEARNING_RATES = (1.0e-3, 2.0e-3, 4.0e-3)
BATCH_SIZES = (4, 8)
TUNING_SEED = 0
SEEDS = 3
"""Of the comparison: those after the one that is tuned at."""
BUDGET = 6.0
"""TFLOP of a run."""
FINE_TUNING = {"objective": "clm", "steps": 100, "batch_size": 8, "lr": 1.0e-3}
MEASURED_STEPS = 16
"""Of each phase, for what a step takes."""

BASE: dict[str, Any] = {
    "seed": 0,
    "seq_len": 128,
    "data": {"source": "python-docs", "validation_fraction": 0.1},
    "tokenizer": {"type": "byte", "vocab_size": None},
    "model": {"d_model": 64, "attention": {"n_heads": 2}, "mlp": {"hidden": 192}},
    "objective": {"variants": 1},
    "n_stacks": 4,
    "stack": {"blocks": 2, "init": "copy"},
    "stacks": [],
    "growth": {},
    "adapters": {},
    "optimizer": {},
    "compute": {"device": "cpu", "threads": THREADS, "branch_threads": THREADS},
    "trunk": {},
    "joint": {},
    "fine_tune": {},
    "evaluate": {"samples": 512, "draws": 4, "mask_rates": [0.5]},
    "analyse": {},
    "samples": {},
    "export": {},
    "activations": {"budget_gb": 8.0},
    "checkpoint": {"every": 500},
    "tracking": {"enabled": False, "experiment": "quality"},
}

PAGE, FIGURE = "docs/quality.md", "docs/quality.svg"
MARK, END = "<!-- measured: -->", "<!-- end -->"
"""Around the table in the page."""

END_TO_END: Changes = {"growth": {"strategy": "end_to_end"}}
WINDOW: Changes = {"growth": {"window": 1, "masks": "redraw"}}
GRADUAL: Changes = {"growth": {"mode": "fused", "fusion_mode": "trainable"}}
LIGHT: Changes = {"optimizer": {"state": "int8", "in_backward": True, "grad_clip": None}}
"""What saves memory in any training at no operations."""
LEAN: Changes = {**LIGHT, "compute.activation_checkpointing": True}
"""What saves most, for about a quarter more operations."""


@dataclass(frozen=True)
class Arm:
    """A way of training."""

    name: str
    title: str
    changes: Changes
    """Of `BASE`."""
    steps: tuple[float, ...] = ()
    """Steps of the phase of each stack, in any unit; none given: the same for all."""
    lrs: tuple[float, ...] = ()
    """Learning rate of each stack, as a share of the tuned one; none given: 1."""
    tuned_as: str | None = None
    """The arm whose best setting it takes."""


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    lr: float
    batch_size: int


@dataclass(frozen=True)
class PhaseCost:
    """What a phase takes."""

    stack: int
    """Whose steps it takes."""
    flops: float
    """Of a step."""
    peak: int
    """Bytes in a step."""
    flops_per_row: float
    """Of a sample, to cache the boundary below."""


@dataclass(frozen=True)
class Result:
    """What a run has given."""

    arm: str
    setting: Setting
    seed: int
    nelbo: float
    """Of the rack, in bits per byte of held-out text."""
    clm: float | None
    """Next-token loss after a short fine-tuning (bits per byte)."""
    flops: float
    """Spent on the rack."""
    tokens: int
    """Trained on, of all phases together."""
    steps: list[int]
    peak: int
    """Bytes: the most in any training step."""
    trunk_bytes: int
    """Of all trunk artifacts."""
    seconds: float
    code: str
    """Digest of the library."""


ARMS: tuple[Arm, ...] = (
    Arm("end-to-end", "end to end", END_TO_END),
    Arm("end-to-end-lean", "end to end, lean", {**END_TO_END, **LEAN}),
    Arm("shallow-4", "end to end, 4 blocks", {**END_TO_END, "n_stacks": 2}),
    Arm("shallow-2", "end to end, 2 blocks", {**END_TO_END, "n_stacks": 1}),
    Arm("append-halves", "append, 2 x 4 blocks", {"n_stacks": 2, "stack.blocks": 4}),
    Arm("append-quarters", "append, 4 x 2 blocks", {}),
    Arm("append-quarters-light", "append, 4 x 2 blocks, light", LIGHT),
    Arm("window", "window of 4 blocks by 2", WINDOW),
    Arm("window-light", "window of 4 blocks by 2, light", {**WINDOW, **LIGHT}),
    Arm("insert", "insert, 4 x 2 blocks", {"growth": {"building_mode": "insert", "masks": "redraw"}}),
    Arm("gradual", "gradual growth, 4 x 2 blocks", GRADUAL),
    Arm("window-lean", "window of 4 blocks by 2, lean", {**WINDOW, **LEAN}),
    Arm("append-nf4", "append, 4 x 2 blocks, nf4 trunk", {"trunk.precision": "nf4"}, tuned_as="append-quarters"),
)


@dataclass
class Bench:
    """Runs arms, and keeps what they gave."""

    directory: Path
    """Absolute: where everything is kept."""
    budget: float
    """TFLOP, or with `by_tokens` millions of tokens."""
    base: dict[str, Any]
    """Params that the arms change."""
    by_tokens: bool = False
    project: str = "project-0"
    """The directory within `directory` in which stages run."""

    def run(self, arm: Arm, setting: Setting, seed: int, *, clm: bool = False) -> Result:
        """One run, unless its result is there."""
        own = {"steps": arm.steps, "lrs": arm.lrs, "seed": seed, "clm": clm, **vars(setting)}
        file = self._file("results", arm, own | {"budget": self.budget, "by_tokens": self.by_tokens})
        if file.exists():
            found = json.loads(file.read_text())
            return Result(**{**found, "arm": arm.name, "setting": Setting(**found["setting"])})
        began = time.monotonic()
        costs = self.costs(arm, setting.batch_size)
        with self._inside():
            tree = self._tree(arm, setting, seed)
            self._bring(tree, "tokenize")
            samples = len(open_tokens(read(Path("artifacts/tokens"), TOKENS), tree["seq_len"]).train)
            steps, caching = self._steps(arm, costs, setting, samples * tree["objective"]["variants"])
            lrs = arm.lrs or (1.0,) * len(steps)
            tree["stacks"] = [
                {**dict(own), "steps": n, "lr": setting.lr * share}
                for own, n, share in zip(tree["stacks"] or [{}] * len(steps), steps, lrs, strict=True)
            ]
            if clm:
                tree["fine_tune"] = {"clm": FINE_TUNING}
            stages = self._bring(tree, *(["evaluate_fused", "evaluate_clm"] if clm else ["evaluate_fused"]))
            trunks = [Path(path) for stage in stages if stage.script == "quantize_trunk" for path in stage.outputs]
            result = Result(
                arm=arm.name,
                setting=setting,
                seed=seed,
                nelbo=_metric("fused", "nelbo"),
                clm=_metric("clm", "next_token") if clm else None,
                flops=caching + sum(steps[c.stack] * c.flops for c in costs),
                tokens=sum(steps[c.stack] for c in costs) * setting.batch_size * tree["seq_len"],
                steps=[steps[c.stack] for c in costs],
                peak=max(c.peak for c in costs),
                trunk_bytes=sum(f.stat().st_size for path in trunks for f in path.rglob("*.safetensors")),
                seconds=time.monotonic() - began,
                code=digest_code(["stackwise"]),
            )
        _write(file, {**vars(result), "setting": vars(setting)})
        print(
            f"{arm.name:<24} lr {setting.lr:g} batch {setting.batch_size} seed {seed}: "
            f"{result.nelbo:.4f} bits per byte, {result.flops / 1e12:.3f} TFLOP, {result.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return result

    def costs(self, arm: Arm, batch_size: int) -> list[PhaseCost]:
        """What a step of each phase takes, measured in a few real ones on a little of the text."""
        file = self._file("costs", arm, {"batch_size": batch_size, "code": digest_code(["stackwise"])})
        if file.exists():
            return [PhaseCost(**cost) for cost in json.loads(file.read_text())]
        tree = self._tree(arm, Setting(1e-3, batch_size), TUNING_SEED)
        tree["data"] = {**tree["data"], "max_documents": 12, "validation_fraction": 0.3}
        tree["stack"] = {**tree["stack"], "steps": MEASURED_STEPS}
        found = []
        remove(self.directory / self.project / "measured")  # a boundary that is there would cost nothing
        with self._inside("measured"):
            _write_params(tree)
            params, stages = planned()
            wanted = needed(stages, lambda stage: stage.name == "fuse")
            samples, caching = 0, 0.0
            every = {f"train_{p.name}": p for p in phases(params.growth, params.n_stacks)}
            for stage in wanted:
                with _metered() as trainings, Meter() if stage.script == "cache_activations" else _nothing() as meter:
                    call(stage.command)
                if stage.name == "tokenize":
                    samples = len(open_tokens(read(Path("artifacts/tokens"), TOKENS), params.seq_len).train)
                if stage.script == "cache_activations":
                    caching = meter.flops / (samples * params.objective.variants)
                for own in trainings:
                    phase: Phase = every[stage.name]
                    found.append(PhaseCost(phase.stack, own.flops / MEASURED_STEPS, own.peak, caching))
                    caching = 0.0
        _write(file, [vars(cost) for cost in found])
        return found

    def _file(self, kind: str, arm: Arm, more: Mapping[str, Any]) -> Path:
        """Where something is kept; what changes no result does not count."""
        params = {name: part for name, part in changed(self.base, arm.changes).items() if name not in UNTRACKED}
        key = json.loads(json.dumps([params, dict(more)]))
        return self.directory / kind / f"{digest_json(key)[:32]}.json"

    def _steps(self, arm: Arm, costs: Sequence[PhaseCost], setting: Setting, rows: int) -> tuple[list[int], float]:
        """Steps of each stack, and the operations that go into cached boundaries."""
        n = 1 + max(c.stack for c in costs)
        weights = arm.steps or (1.0,) * n
        if len(weights) != n:
            raise UserError(f"{arm.name}: has {n} stacks and steps for {len(weights)}")
        caching = rows * sum(c.flops_per_row for c in costs)
        if self.by_tokens:
            tokens = setting.batch_size * self.base["seq_len"] * sum(weights[c.stack] for c in costs)
            unit = self.budget * 1e6 / tokens
        else:
            unit = (self.budget * 1e12 - caching) / sum(weights[c.stack] * c.flops for c in costs)
        if unit <= 0:
            raise UserError(
                f"{arm.name}: the budget does not even pay for its cached activations; give more with --budget"
            )
        return [max(1, round(unit * weight)) for weight in weights], caching

    def _tree(self, arm: Arm, setting: Setting, seed: int) -> dict[str, Any]:
        """The params of a run, without its steps."""
        accumulate = max(1, setting.batch_size // MICRO_BATCH)
        tree = changed(self.base, {"seed": seed, **arm.changes, "stack.lr": setting.lr})
        tree["stack"]["batch_size"] = setting.batch_size
        tree["joint"] = {"batch_size": setting.batch_size, **tree["joint"]}
        if accumulate > 1:
            tree["optimizer"] = {**tree["optimizer"], "accumulate": accumulate}
        return tree

    def _bring(self, tree: dict[str, Any], *names: str) -> list[Stage]:
        """The stages that lead to those of these names, brought up to date."""
        _write_params(tree)
        params, stages = planned()
        wanted = needed(stages, lambda stage: stage.name in names)
        Memory(self.directory / "memory").bring(wanted, params)
        return wanted

    @contextmanager
    def _inside(self, part: str = "") -> Iterator[None]:
        root = self.directory / self.project / part
        root.mkdir(parents=True, exist_ok=True)
        with inside(root):
            yield


def changed(tree: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of params with other values at some dotted paths."""
    tree = json.loads(json.dumps(tree))
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = json.loads(json.dumps(value))
    return tree


def settings(arm: Arm) -> list[Setting]:
    """The grid. Updates in the backward pass keep no gradient to add micro-batches to."""
    in_backward = arm.changes.get("optimizer", {}).get("in_backward", False)
    return [
        Setting(lr, size) for lr, size in product(LEARNING_RATES, BATCH_SIZES) if size <= MICRO_BATCH or not in_backward
    ]


@contextmanager
def _metered() -> Iterator[list[Meter]]:
    """Trainings of stages that run in here are metered."""
    found: list[Meter] = []

    def train(run: Run[Any], watcher: Watcher) -> list[float]:
        with Meter() as meter:
            losses = train_unmetered(run, watcher)
        found.append(meter)
        return losses

    with patch("stackwise.growth.tuning.train", train):
        yield found


@contextmanager
def _nothing() -> Iterator[Any]:
    yield None


def _metric(model: str, measure: str) -> float:
    return float(json.loads(Path(f"metrics/{model}.json").read_text())[measure]["bits_per_byte"])


def _write_params(tree: Mapping[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(dict(tree)))


def _write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(file)


CONTROL = "end-to-end"
QUICK_CHANGES: Changes = {"data.max_documents": 80, "evaluate.samples": 128}
QUICK = (CONTROL, "shallow-4", "append-halves", "window-light")
_HALF, _THIRD = ("window-light",), ("window-lean",)
"""What is to have at most 0.55 and 0.30 of the control's memory."""
_SHALLOW = {
    "window": "shallow-4",
    "window-light": "shallow-4",
    "append-halves": "shallow-4",
    "append-quarters": "shallow-2",
    "append-quarters-light": "shallow-2",
}
"""The shallow model that takes the memory of an arm."""
_NF4, _BF16 = "append-nf4", "append-quarters"

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % points of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """By how much an arm's NELBO differs from another's, in % of the other's mean; below 0 it is better."""

    mean: float
    half: float
    """Half the 95 % interval (Student's t, seed by seed)."""

    @classmethod
    def between(cls, own: Sequence[Result], other: Sequence[Result]) -> "Difference":
        """Of runs with the same seeds, two at least."""
        assert [r.seed for r in own] == [r.seed for r in other]
        scale = 100 / statistics.mean(r.nelbo for r in other)
        found = [scale * (a.nelbo - b.nelbo) for a, b in zip(own, other, strict=True)]
        t = T_975[min(len(found) - 1, len(T_975)) - 1]
        return cls(statistics.mean(found), t * statistics.stdev(found) / math.sqrt(len(found)))

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f} %"


@dataclass(frozen=True)
class Task:
    """A run that is wanted."""

    arm: Arm
    setting: Setting
    seed: int
    clm: bool = False


def run_all(bench: Bench, tasks: Sequence[Task], jobs: int) -> list[Result]:
    """Their results, in order; `jobs` run at a time, each in a process and a directory of its own."""
    if jobs == 1:
        return [bench.run(task.arm, task.setting, task.seed, clm=task.clm) for task in tasks]
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    with ProcessPoolExecutor(jobs, context, initializer=_begin_worker, initargs=(bench, numbers)) as pool:
        return list(pool.map(_work, tasks))


_worker: Bench


def _begin_worker(bench: Bench, numbers: Any) -> None:
    global _worker
    _worker = replace(bench, project=f"project-{numbers.get()}")


def _work(task: Task) -> Result:
    return _worker.run(task.arm, task.setting, task.seed, clm=task.clm)


def tune(bench: Bench, arms: Sequence[Arm], jobs: int) -> dict[str, Setting]:
    """The best setting of each arm in its grid."""
    tasks = [Task(arm, setting, TUNING_SEED) for arm in arms if arm.tuned_as is None for setting in settings(arm)]
    best: dict[str, Result] = {}
    for found in run_all(bench, tasks, jobs):
        if found.arm not in best or found.nelbo < best[found.arm].nelbo:
            best[found.arm] = found
    return {arm.name: best[arm.tuned_as or arm.name].setting for arm in arms}


def compare(
    bench: Bench, arms: Sequence[Arm], tuned: Mapping[str, Setting], seeds: Sequence[int], jobs: int, *, clm: bool
) -> dict[str, list[Result]]:
    """The runs of each arm at its setting, by seed."""
    tasks = [Task(arm, tuned[arm.name], seed, clm) for seed in seeds for arm in arms]
    found = run_all(bench, tasks, jobs)
    return {arm.name: [r for r in found if r.arm == arm.name] for arm in arms}


def goals(found: Mapping[str, list[Result]]) -> Iterator[Line]:
    """What the arms are held to, of those that have run."""
    control = found[CONTROL]
    for names, most, worst in ((_HALF, 0.55, None), (_THIRD, 0.30, 1.0)):
        for name in names:
            if name in found:
                peak = found[name][0].peak
                yield Line(f"memory: {name}", f"{peak / 2**20:.1f} MiB", peak / control[0].peak, at_most=most)
                difference = Difference.between(found[name], control)
                if worst is None:
                    yield Line(f"NELBO, %, lower end: {name}", str(difference), difference.low, at_most=0.0)
                else:
                    yield Line(f"NELBO, %: {name}", str(difference), difference.mean, at_most=worst)
    for name, shallow in _SHALLOW.items():
        if name in found and shallow in found:
            difference = Difference.between(found[name], found[shallow])
            yield Line(f"NELBO, %: {name} over {shallow}", str(difference), difference.mean, at_most=-2.0)
    if _NF4 in found and _BF16 in found:
        difference = Difference.between(found[_NF4], found[_BF16])
        yield Line("NELBO, %: nf4 trunk over bf16", str(difference), difference.mean, at_most=1.0)
        own, other = (found[name][0].trunk_bytes for name in (_NF4, _BF16))
        yield Line("trunk: nf4 over bf16", f"{own / 1024:.0f} KiB", own / other, at_most=0.30)


def as_markdown(arms: Sequence[Arm], found: Mapping[str, list[Result]]) -> str:
    """The table of docs/quality.md."""
    control = found[CONTROL]
    clm = all(r.clm is not None for runs in found.values() for r in runs)
    head = ["", "learning rate, batch", "memory", "TFLOP", "tokens", "NELBO", "against end to end"]
    lines = [head + ["CLM"] * clm, ["---"] * (len(head) + clm)]
    for arm in arms:
        runs = found[arm.name]
        first, values = runs[0], [r.nelbo for r in runs]
        line = [
            arm.title,
            f"{first.setting.lr:g}, {first.setting.batch_size}",
            f"{first.peak / control[0].peak:.2f}",
            f"{statistics.mean(r.flops for r in runs) / 1e12:.2f}",
            f"{first.tokens / 1e6:.2f} M",
            f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}",
            "" if runs is control else str(Difference.between(runs, control)),
        ]
        lines.append(line + [f"{statistics.mean(r.clm or 0 for r in runs):.4f}"] * clm)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def draw(arms: Sequence[Arm], found: Mapping[str, list[Result]], out: Path) -> None:
    """NELBO against memory, a point for each arm with its 95 % interval; the same file for the same numbers."""
    import matplotlib  # only here: it takes a while

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams.update(
        {"svg.hashsalt": "stackwise", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3}
    )
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    control = found[CONTROL]
    for arm in arms:
        runs = found[arm.name]
        values = [r.nelbo for r in runs]
        t = T_975[min(len(values) - 1, len(T_975)) - 1]
        half = t * statistics.stdev(values) / math.sqrt(len(values))
        x, y = runs[0].peak / control[0].peak, statistics.mean(values)
        axes.errorbar([x], [y], yerr=[half], marker="o", capsize=4)
        axes.annotate(arm.title, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=9)
    axes.set_xlabel("peak memory of a training step (end to end: 1)")
    axes.set_ylabel("NELBO on held-out text (bits per byte)")
    axes.set_xlim(left=0)
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables; returns 1 if a goal is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"TFLOP of a run (default: {BUDGET:g})")
    parser.add_argument("--tokens", type=float, help="spend equal tokens instead (millions of a run)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of the comparison (default: {SEEDS})")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (default: 2)")
    parser.add_argument(
        "--only", nargs="+", choices=[a.name for a in ARMS], help="arms besides the control (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="some arms, a tenth of operations and text, no grid, two seeds"
    )
    parser.add_argument("--dir", type=Path, default=Path(".stackwise/quality"), help="where results are kept")
    parser.add_argument("--track", action="store_true", help="log all stages to MLflow, as the experiment `quality`")
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/quality.md and draw docs/quality.svg"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    options = parser.parse_args(arguments)
    if options.seeds < 2 or options.jobs < 1:
        parser.error("--seeds must be at least 2, because an interval needs them, and --jobs at least 1")

    names = {CONTROL, *(options.only or (QUICK if options.quick else [arm.name for arm in ARMS]))}
    arms = [arm for arm in ARMS if arm.name in names]
    if missing := {arm.tuned_as for arm in arms} - {None} - names:
        parser.error(f"--only: {', '.join(map(str, missing))} must be among the arms, because others take its setting")
    base = changed(BASE, {"tracking.enabled": options.track, **(QUICK_CHANGES if options.quick else {})})
    budget = (options.tokens or options.budget) / (10 if options.quick else 1)
    bench = Bench(options.dir.absolute(), budget, base, by_tokens=options.tokens is not None)
    if options.quick:
        tuned = {arm.name: Setting(LEARNING_RATES[len(LEARNING_RATES) // 2], MICRO_BATCH) for arm in arms}
    else:
        tuned = tune(bench, arms, options.jobs)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + (2 if options.quick else options.seeds))
    found = compare(bench, arms, tuned, seeds, options.jobs, clm=not options.quick)
    table = as_markdown(arms, found)
    print(table)
    if len({r.code for runs in found.values() for r in runs}) > 1:
        print(f"Not all of these ran the same code: remove {bench.directory} to run all of them again.\n")
    if options.write:
        before, _, after = (PROJECT / PAGE).read_text().partition(MARK)
        (PROJECT / PAGE).write_text(f"{before}{MARK}\n\n{table}\n{END}{after.partition(END)[2]}")
        draw(arms, found, PROJECT / FIGURE)
    return report(goals(found), check=options.check)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
