"""What every stage script does the same way: arguments, its view of the parameters, artifacts, log, record, errors."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from stackwise.artifacts.code import PROJECT, digest_code
from stackwise.artifacts.manifest import REMEDY, Artifact, Draft, digest_json, publish, read
from stackwise.config.params import UNTRACKED, Params, load, view
from stackwise.errors import UserError
from stackwise.tracking.record import Record
from workflow.stages import ALL, RENDER, Stage, check_rendered

LOGS = Path("logs")
CHECKPOINTS = Path(".stackwise/checkpoints")
_MAIN_FIGURES = ("nelbo.bits_per_byte", "next_token.bits_per_byte", "labelled.bits_per_byte")
NEWS_EVERY = 2.0
"""Seconds between two lines of progress."""


class StageRun:
    """One execution of a stage's script."""

    def __init__(self, stage: Stage, arguments: argparse.Namespace, params: Params, record: Record) -> None:
        self.stage = stage
        self.arguments = arguments
        self.params = params
        """What this stage may read of params.yaml; anything else is an AttributeError."""
        self.record = record
        self._inputs: dict[str, Artifact] = {}
        self._log = _open_log(stage.name)
        self._last_news = 0.0

    def say(self, message: str) -> None:
        """A line on the terminal and in the stage's log."""
        line = f"[{self.stage.name}] {message}"
        print(line, file=sys.stderr, flush=True)
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=self._log, flush=True)

    def news(self, message: Callable[[], str], *, last: bool = False) -> None:
        """Progress: like `say`, but not more often than `NEWS_EVERY`, unless it is the last."""
        now = time.monotonic()
        if last or now - self._last_news >= NEWS_EVERY:
            self._last_news = now
            self.say(message())

    def counter(self, unit: str) -> Callable[[int], None]:
        """A progress callback for work whose end is not known: is told how much is done."""
        return lambda done: self.news(lambda: f"{done:,} {unit}")

    def read(self, role: str, path: Path, kind: str) -> Artifact:
        """Open and verify an input."""
        artifact = read(path, kind)
        self._inputs[role] = artifact
        self.record.add("input", role=role, path=str(path), kind=kind, digest=artifact.digest)
        return artifact

    @contextmanager
    def publish(self, path: Path, kind: str) -> Iterator[Draft]:
        """Write an output; its manifest names this stage's parameters and the inputs that were read."""
        with publish(path, kind=kind, params=self.resolved(), inputs=self._inputs) as draft:
            yield draft
        digest = read(path, kind).digest
        self.record.add("output", role=kind, path=str(path), kind=kind, digest=digest)
        self.say(f"wrote {path} ({digest[:12]})")

    def read_json(self, path: Path) -> Any:
        """Read a small JSON file that another stage has made.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            raise UserError(f"{path}: missing or damaged (not JSON); {REMEDY}") from None

    def write_json(self, path: Path, value: object) -> None:
        """Write a small JSON file whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.replace(path)

    def report_metrics(self, name: str, metrics: Mapping[str, Any], *, depth: int | None) -> None:
        """Tell the record what an evaluation has found; those of the rack after `depth` + 1 trainings form a curve."""
        values = dict(_leaves(metrics))
        self.record.add("result", values={f"{name}.{key}": value for key, value in values.items()})
        if depth is not None:
            self.record.add("depth", stack=depth, values={f"depth.{key}": value for key, value in values.items()})
        if (accuracy := values.get("classification.accuracy")) is not None:
            self.say(f"accuracy {accuracy:.4f} (majority {values['classification.majority.accuracy']:.4f})")
            return
        main = next(values[key] for key in _MAIN_FIGURES if key in values)
        self.say(f"{main:.4f} bits per byte (unigram {values['unigram.bits_per_byte']:.4f})")

    def resolved(self) -> dict[str, Any]:
        """The parameters that this stage declares, as JSON values."""
        return resolve(self.params)

    def rows_made(self, done: int, wanted: int) -> None:
        """Progress callback for cached activations."""
        self.news(lambda: f"cached {done:,} of {wanted:,} rows", last=done == wanted)

    def checkpoint_file(self) -> Path:
        """Where this run keeps its checkpoint: named by inputs, parameters and code."""
        key = {
            "stage": self.stage.name,
            "params": self.resolved(),
            "inputs": {role: artifact.digest for role, artifact in self._inputs.items()},
            "code": digest_code((self.stage.path, *self.stage.sources)),
        }
        return CHECKPOINTS / f"{self.stage.name}-{digest_json(key)[:32]}.safetensors"


class TrainingWatcher:
    """Tells the terminal, the log and the record how training goes."""

    def __init__(self, run: StageRun, *, steps: int, tokens_per_step: int) -> None:
        self._run, self._steps, self._tokens = run, steps, tokens_per_step
        self._start, self._began = 0, time.monotonic()

    def resumed(self, step: int) -> None:
        """Training goes on after `step` steps of an earlier run."""
        self._start = step
        self._run.record.add("resumed", step=step)
        self._run.say(f"resumed from step {step} of {self._steps}")

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        """`step` steps are done; `losses` are those of the latest, `waited` is the time without data (seconds)."""
        self._run.record.add("steps", first=step - len(losses), values={"loss": list(losses)})
        seconds = time.monotonic() - self._began
        per_step = seconds / max(1, step - self._start)
        speed, eta = self._tokens / per_step, per_step * (self._steps - step)
        waiting = waited / max(seconds, 1e-9)
        self._run.record.add("metrics", step=step, values={"tokens_per_second": speed, "waiting_share": waiting})
        self._run.news(
            lambda: (
                f"step {step}/{self._steps}  loss {losses[-1]:.4f}  {speed:,.0f} tokens/s  "
                f"waiting {waiting:.1%}  ETA {_clock(eta)}"
            ),
            last=step == self._steps,
        )


def check_params() -> None:
    """Stop as `run_stage` does if the params file is bad. A script calls it before its imports that take seconds."""
    if not {"-h", "--help"} & set(sys.argv):
        with _explained_errors():
            load(_params_argument(add_help=False).parse_known_args()[0].params)


def run_stage(
    description: str | None, declare: Callable[[argparse.ArgumentParser], None], work: Callable[[StageRun], None]
) -> None:
    """The main function of a stage script. Exits with 1 and one message where a person can put things right.

    Args:
        description: for `--help`.
        declare: adds the script's own arguments.
        work: does the stage's work.
    """
    parser = _params_argument(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--defaults",
        nargs="+",
        help="keys that the params file leaves to their defaults; for DVC, which watches this line",
    )
    declare(parser)
    arguments = parser.parse_args()
    with _explained_errors():
        params = load(arguments.params)
        stage = _find_stage(params, arguments)
        declared = params if ALL in stage.params else view(params, stage.params)
        facts = {
            "stack": getattr(arguments, "index", None),
            "params": resolve(declared),
            "pipeline": params.model_dump(),
            "config": digest_json(params.model_dump(exclude=set(UNTRACKED))),
            "tracking": params.tracking.model_dump(),
        }
        record = Record(stage.name, facts, follow=params.tracking.enabled)
        status = "failed"
        try:
            work(StageRun(stage, arguments, declared, record))
            status = "finished"
        finally:
            record.close(status, peak_memory=_peak_memory(), modules=_own_modules())


def _params_argument(**settings: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(**settings)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    return parser


@contextmanager
def _explained_errors() -> Iterator[None]:
    """Exit with one message where a person can put things right."""
    try:
        yield
    except UserError as error:
        _fail(f"error: {error}")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except OSError as error:
        _fail(f"error: {error.filename or 'disk'}: {error.strerror}; check the disk's space and permissions")


def resolve(params: Params) -> dict[str, Any]:
    """Those parameters of a view that change results, as JSON values."""
    return {name: value for name, value in params.model_dump(warnings=False).items() if name not in UNTRACKED}


def _find_stage(params: Params, arguments: argparse.Namespace) -> Stage:
    """The stage that this call of the script is."""
    script = Path(sys.argv[0]).stem
    for stage in check_rendered(params):
        wanted = {k.replace("_", "-"): str(v) for k, v in stage.arguments.items() if k in ("index", "out")}
        if stage.script == script and all(str(getattr(arguments, k)) == v for k, v in wanted.items()):
            return stage
    raise UserError(
        f"{script}: no stage of {arguments.params} has these arguments; `{RENDER}` renders dvc.yaml, which lists every "
        "stage's command"
    )


def _open_log(name: str) -> Any:
    LOGS.mkdir(exist_ok=True)
    return (LOGS / f"{name}.log").open("a", encoding="utf-8")


def _own_modules() -> list[str]:
    """The sources of this project that this process has imported, relative to the project."""
    files = (getattr(m, "__file__", None) for m in list(sys.modules.values()))
    own = (Path(f).relative_to(PROJECT) for f in files if f and f.startswith(f"{PROJECT}/"))
    return sorted(str(path) for path in own if ".venv" not in path.parts)


def _peak_memory() -> int:
    """Peak resident memory of this process (bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings, by dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", float(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def _fail(message: str, code: int = 1) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
