"""The process that feeds MLflow from the records: `python -m stackwise.tracking.follow` in the project.

There is one for each project. Records start it; it ends by itself when nothing is left to follow. It may be
killed at any moment: how far each record has been logged is kept beside it, and what the next one repeats
changes nothing, since runs are found by their tags and metrics carry the times of their events.

What cannot be logged (an unreachable server, a deleted run) is left for the next follower, with one line in
the log.
"""

import fcntl
import getpass
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil

from stackwise.tracking.record import FOLLOWER_LOCK, RECORDS, read_record

if TYPE_CHECKING:  # importing mlflow takes a second: only the process that holds the lock does it
    from mlflow.entities import DatasetInput, Metric, Run

DEFAULT_URI = "sqlite:///mlflow.db"
POLL = 1.0
"""Seconds between two looks at the records."""
IDLE = 5.0
"""Seconds with nothing to follow after which the process ends."""
KEEP = 1000
"""How many records are kept."""
ABANDON = 7 * 24 * 3600.0
"""Seconds after its last event, after which a record that cannot be logged is not tried again."""
CLOCK_STEP = 60.0
"""Seconds by which the clock may be set while a stage runs; beyond, its process is taken for another."""
SAMPLING = 5.0
"""Seconds between two samples of the machine; stages of a small pipeline take some tens of seconds."""
DATASETS = ("corpus", "tokens")
"""Kinds of artifacts that MLflow shows as datasets."""
CONFIG_TAG = "stackwise.config"
RECORD_TAG = "stackwise.record"
GATHER = 1000
"""Metrics that are logged before progress is kept; MLflow takes as many in one request."""
# MLflow's limits of lengths: of names and values of parameters, of digests of datasets.
MAX_NAME = 250
MAX_VALUE = 6000
MAX_DIGEST = 36


def say(message: str) -> None:
    """Write one line to the log (the standard output, which `Record` leads to `follower.log`)."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(message.split())[:400], flush=True)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested parameters as MLflow takes them: dotted names; texts as they are, all other values as JSON."""
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping) and (value or not prefix):
        items = iter(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = enumerate(value)
    else:
        return {_name(prefix): _text(value)}
    dotted = f"{prefix}." if prefix else ""
    return {k: v for key, item in items for k, v in flatten(item, f"{dotted}{key}").items()}


def _name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_NAME]


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:MAX_VALUE]


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


class Events:
    """What a few events of a record say, gathered for few requests."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.metrics: list[Metric] = []
        self.datasets: list[DatasetInput] = []
        self.of_pipeline: list[Metric] = []
        """Metrics that the parent shows."""
        self.texts: dict[str, str] = {}
        """By the file that each becomes."""
        self.end: dict[str, Any] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event; those of kinds that MLflow shows nothing of are passed over."""
        match event["event"]:
            case "start":
                self.params = flatten(event["params"])
            case "input" | "output" as direction:
                self.tags[_name(f"{direction}.{event['role']}")] = event["digest"]
                if direction == "input" and event["kind"] in DATASETS:
                    self.datasets.append(_dataset(**event))
            case "resumed":
                self.tags["resumed_from"] = str(event["step"])
            case "metrics":
                self.metrics += _metrics(event, event["step"])
            case "steps":
                for name, values in event["values"].items():
                    for step, value in enumerate(values, event["first"]):
                        self.metrics += _metrics({**event, "values": {name: value}}, step)
            case "depth":
                self.of_pipeline += _metrics(event, event["stack"])
            case "result":
                self.metrics += _metrics(event, 0)
                self.of_pipeline += [metric for metric in _metrics(event, 0) if "." in metric.key]
            case "text":
                self.texts[event["file"]] = event["text"]
            case "end":
                self.tags["status"] = event["status"]
                facts = {"duration_seconds": event["seconds"], "peak_memory_bytes": event.get("peak_memory")}
                self.metrics += _metrics({**event, "values": facts}, 0)
                self.end = event


def _metrics(event: dict[str, Any], step: int) -> list["Metric"]:
    """The values of an event at a step; those that are missing (null) are left out."""
    from mlflow.entities import Metric

    # The time of the event, not of logging: a metric that is logged twice is then the same metric.
    at = _milliseconds(event["time"])
    return [Metric(_name(n), float(v), at, step) for n, v in event["values"].items() if v is not None]


def _dataset(*, role: str, path: str, kind: str, digest: str, **_: Any) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=Path(path).name,
        digest=digest[:MAX_DIGEST],
        source_type="local",
        source=json.dumps({"uri": path}),
        profile=json.dumps({"kind": kind, "sha256": digest}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", role)])


@dataclass
class Pipeline:
    """The parent run of all stage executions of one configuration."""

    run_id: str
    running: bool
    statuses: dict[str, str] = field(default_factory=dict)
    """How the latest execution of each stage ended."""


class Experiment:
    """An experiment of a tracking store; all that MLflow is told goes through here."""

    def __init__(self, uri: str, name: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(uri)
        self.name = name
        self._pipelines: dict[str, Pipeline] = {}
        found = self.client.get_experiment_by_name(name)
        self.id: str = found.experiment_id if found else self.client.create_experiment(name)
        if found and found.lifecycle_stage == "deleted":  # its name cannot be given to another
            self.client.restore_experiment(self.id)
            say(f"{uri}: restored the deleted experiment {name} (tracking.experiment names another)")

    def find(self, tag: str, value: str) -> "Run | None":
        """The oldest run with a tag."""
        query = f"tags.`{tag}` = '{value}'"
        oldest_first = ["attributes.start_time ASC"]
        runs = self.client.search_runs([self.id], query, max_results=1, order_by=oldest_first)
        return runs[0] if runs else None

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: "list[Metric] | None" = None,
    ) -> None:
        """Log any number of things; the client divides what is too much for one request."""
        from mlflow.entities import Param, RunTag

        self.client.log_batch(
            run_id,
            metrics or (),
            [Param(*item) for item in (params or {}).items()],
            [RunTag(*item) for item in (tags or {}).items()],
        )

    def pipeline(self, start: dict[str, Any]) -> Pipeline:
        """The parent of an execution, which runs now."""
        config = start["config"]
        if config not in self._pipelines:
            tags = {CONFIG_TAG: config, "mlflow.source.name": "params.yaml"}
            run = self.find(CONFIG_TAG, config) or self.client.create_run(
                self.id, _milliseconds(start["time"]), tags, f"config-{config[:8]}"
            )
            # All that are missing, not only those of a new run: a follower may have been killed in between.
            # Those that are there stay: sections that change no result may differ within one configuration.
            params = {k: v for k, v in flatten(start["pipeline"]).items() if k not in run.data.params}
            self.log(run.info.run_id, params=params)
            self._pipelines[config] = Pipeline(run.info.run_id, run.info.status == "RUNNING")
        pipeline = self._pipelines[config]
        if not pipeline.running:
            self.client.update_run(pipeline.run_id, "RUNNING")
            pipeline.running = True
        return pipeline


def _origin(start: dict[str, Any]) -> dict[str, str]:
    """Tags that say who made a run from what; the `mlflow.` ones fill columns of the UI."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in a container
        user = str(os.getuid())
    tags = {"mlflow.user": user, "mlflow.source.type": "LOCAL"}
    if start["git"]:
        tags |= {"mlflow.source.git.commit": start["git"], "git_commit": start["git"]}
    return tags


@dataclass
class Progress:
    """How far a record has been logged; kept beside it."""

    uri: str
    """The store that it goes to, whatever the environment of the next follower says."""
    run: str = ""
    """The child run; empty until it has been created."""
    offset: int = 0
    """Bytes of the record that have been logged."""
    done: bool = False

    @staticmethod
    def path(record: Path) -> Path:
        """Where the progress of a record is kept."""
        return record.with_suffix(".followed")

    @classmethod
    def load(cls, record: Path) -> "Progress | None":
        """The progress that a follower before this one has left, if any."""
        try:
            return cls(**json.loads(cls.path(record).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def save(self, record: Path) -> None:
        """Replace what is kept, at once."""
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(self.path(record))


class Execution:
    """One stage execution: its record, and its child run."""

    def __init__(self, record: Path, first: bytes) -> None:
        self.record = record
        self.start: dict[str, Any] = json.loads(first)
        self.tracking: dict[str, Any] = self.start["tracking"]
        before = Progress.load(record)
        self._was_begun = before is not None
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self.tracking.get("uri") or DEFAULT_URI
        self.progress = before or Progress(uri)
        self._identity = hashlib.sha256(first).hexdigest()[:32]
        self._monitor: Any = None  # a SystemMetricsMonitor, which has no types

    def is_alive(self) -> bool:
        """Whether the process that writes the record still does."""
        try:
            process = psutil.Process(self.start["pid"])
            # A process that is much younger than the record has been given the id of one that is gone.
            is_writer = process.create_time() < self.start["time"] + CLOCK_STEP
            return is_writer and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def advance(self, experiment: Experiment, pipeline: Pipeline) -> dict[str, Any] | None:
        """Log what is new; returns the last event once it is logged, or one made up for a killed process."""
        alive = self.is_alive()  # asked first: what it has written before its death is then all read below
        progress = self.progress
        resumed = progress.offset > 0
        if not progress.run:
            self._begin(experiment, pipeline)
        with self.record.open("rb") as file:
            file.seek(progress.offset)
            more = True
            while more:
                more = False
                begin = progress.offset
                events = Events()
                for line in file:
                    if not line.endswith(b"\n"):  # still being written, or cut off by a kill
                        break
                    progress.offset += len(line)
                    try:
                        event = json.loads(line)
                    except ValueError:  # such as after a full disk
                        continue
                    events.add(event)
                    if more := len(events.metrics) >= GATHER:
                        break
                if progress.offset > begin:
                    self._push(events, experiment, pipeline)
                if events.end:
                    return events.end
        if alive:
            if not self._monitor and self.tracking.get("system_metrics"):
                self._watch_machine(resumed=resumed)
            return None
        experiment.log(progress.run, tags={"status": "killed"})
        return {"status": "killed", "time": self.record.stat().st_mtime}

    def _begin(self, experiment: Experiment, pipeline: Pipeline) -> None:
        """Create the child run."""
        # The intention is kept first: a follower that finds it without a run looks before it makes one.
        found = experiment.find(RECORD_TAG, self._identity) if self._was_begun else None
        self.progress.save(self.record)
        start = self.start
        tags = {
            "mlflow.parentRunId": pipeline.run_id,
            "mlflow.source.name": start["argv"][0],
            RECORD_TAG: self._identity,
            "stage": start["stage"],
            "config": start["config"],
            "status": "running",
            **_origin(start),
        }
        if start["stack"] is not None:
            tags["stack"] = str(start["stack"])
        at = _milliseconds(start["time"])
        run = found or experiment.client.create_run(experiment.id, at, tags, start["stage"])
        experiment.log(pipeline.run_id, tags=_origin(start))  # of its latest execution
        self.progress.run = run.info.run_id
        self.progress.save(self.record)

    def _push(self, events: Events, experiment: Experiment, pipeline: Pipeline) -> None:
        """Log gathered events, then keep how far that is."""
        if events.end and events.end["status"] == "finished" and self.tracking.get("registry"):
            self._register(experiment)
        experiment.log(self.progress.run, params=events.params, tags=events.tags, metrics=events.metrics)
        experiment.log(pipeline.run_id, metrics=events.of_pipeline)
        if events.datasets:
            experiment.client.log_inputs(self.progress.run, events.datasets)
        for file, text in events.texts.items():
            experiment.client.log_text(self.progress.run, text, file)
        self.progress.save(self.record)

    def _register(self, experiment: Experiment) -> None:
        """Register what has been made, and tell the registry what has been measured; a failure is said, no more."""
        from stackwise.registry.interface import MODELS
        from stackwise.registry.registering import Registry

        events = read_record(self.record)
        if not any(event.get("kind") in MODELS for event in events):
            return
        registry = Registry(experiment.client, experiment.name, experiment.id)
        try:
            for name in registry.register(self.progress.run, events):
                say(f"{self.record.name}: registered {name}")
            registry.log_metrics(self.progress.run, events)
        except Exception as error:  # of any kind, as all that MLflow raises
            say(f"{self.record.name}: not registered in {self.progress.uri}: {error}")

    def _watch_machine(self, *, resumed: bool) -> None:
        """Log the use of CPU, memory, disk, network and GPU: of the whole machine, not of the stage alone."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor: Any = SystemMetricsMonitor
        uri = self.progress.uri
        self._monitor = monitor(self.progress.run, SAMPLING, resume_logging=resumed, tracking_uri=uri)
        self._monitor.start()

    def leave(self) -> None:
        """Stop what runs beside."""
        if self._monitor:
            self._monitor.finish()
            self._monitor = None


class Follower:
    """Follows all records of the project in the current directory."""

    def __init__(self) -> None:
        self._known: set[str] = set()  # names of records that are followed, or need not be
        self._open: dict[str, Execution] = {}
        self._experiments: dict[tuple[str, str], Experiment | None] = {}

    def find_work(self) -> bool:
        """Look for new records; whether there is something to follow. Asks nothing of MLflow."""
        for name in _record_names():
            if name in self._known:
                continue
            record = RECORDS / name
            progress = Progress.load(record)
            if not (progress and progress.done):
                try:
                    with record.open("rb") as file:
                        first = file.readline()
                    if not first.endswith(b"\n"):  # just begun; looked at again
                        continue
                    execution = Execution(record, first)
                except OSError:  # removed
                    continue
                except (ValueError, KeyError, TypeError) as error:
                    say(f"{name}: not a record ({error!r})")
                else:
                    if execution.tracking.get("enabled"):
                        self._open[name] = execution
            self._known.add(name)
        return bool(self._open)

    def follow(self, lock: TextIO) -> bool:
        """Follow until nothing is left for a while; False if the directory was removed meanwhile."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < IDLE:
            if not _is_in_place(lock):
                return False
            if self.find_work():
                for name in list(self._open):
                    self._advance(name)
                quiet_since = time.monotonic()
            time.sleep(POLL)
        self._prune()
        return True

    def _advance(self, name: str) -> None:
        """Log what is new in a record."""
        execution = self._open[name]
        try:
            experiment = self._experiment(execution)
            if experiment is None:
                self._give_up(name)
                return
            pipeline = experiment.pipeline(execution.start)
            if end := execution.advance(experiment, pipeline):
                self._close(name, experiment, pipeline, end)
        except Exception as error:  # of any kind: MLflow, its stores and servers raise too many to name
            self._give_up(name, error)

    def _experiment(self, execution: Execution) -> Experiment | None:
        """Where an execution is logged; None if that has failed before."""
        key = execution.progress.uri, execution.tracking["experiment"]
        if key not in self._experiments:
            self._experiments[key] = None  # in case of failure: no server is waited for once a record
            self._experiments[key] = Experiment(*key)
        return self._experiments[key]

    def _close(self, name: str, experiment: Experiment, pipeline: Pipeline, end: dict[str, Any]) -> None:
        """End a child run, and its parent unless others of its children run."""
        execution = self._open[name]
        execution.leave()
        status = str(end["status"]).upper()
        at = _milliseconds(end["time"])
        experiment.client.set_terminated(execution.progress.run, status, at)
        pipeline.statuses[execution.start["stage"]] = status
        config = execution.start["config"]
        if not any(e.start["config"] == config for n, e in self._open.items() if n != name):
            worst = next((s for s in pipeline.statuses.values() if s != "FINISHED"), "FINISHED")
            experiment.client.set_terminated(pipeline.run_id, worst, at)
            pipeline.running = False
        execution.progress.done = True
        execution.progress.save(execution.record)
        del self._open[name]

    def _give_up(self, name: str, error: Exception | None = None) -> None:
        """Leave a record to the next follower; when it is old, for good."""
        execution = self._open.pop(name)
        execution.leave()
        try:
            if time.time() - execution.record.stat().st_mtime > ABANDON:
                execution.progress.done = True
                execution.progress.save(execution.record)
        except FileNotFoundError:  # removed, and maybe that is all that is wrong
            return
        if error:
            say(f"{name}: not logged to {execution.progress.uri}: {error}")

    def _prune(self) -> None:
        """Remove all records but the newest."""
        for name in _record_names()[:-KEEP]:
            for suffix in (".jsonl", ".followed", ".partial"):
                (RECORDS / name).with_suffix(suffix).unlink(missing_ok=True)


def _record_names() -> list[str]:
    """Names of all records, oldest first; none if the directory is gone."""
    try:
        return sorted(name for name in os.listdir(RECORDS) if name.endswith(".jsonl"))
    except FileNotFoundError:
        return []


def _is_in_place(lock: TextIO) -> bool:
    """Whether the lock is still the project's: not removed with it, nor made anew for another follower."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(RECORDS / FOLLOWER_LOCK))
    except FileNotFoundError:
        return False


def _prepare_mlflow() -> None:
    """Settings that MLflow reads from the environment, when it is imported."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # What goes wrong is said here, in one line; and a server is given some seconds, not the four minutes that
    # MLflow takes by default. Whoever has set them knows better.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def main() -> None:
    """Follow the records of the project in the current directory, unless another process does."""
    os.nice(10)  # the stages come first
    psutil.cpu_percent()  # measures since the call before it: the first sample of a stage is then no zero
    _prepare_mlflow()
    follower = Follower()
    while True:
        try:
            lock = (RECORDS / FOLLOWER_LOCK).open("a")
        except FileNotFoundError:  # no records
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not follower.follow(lock):
                return
        # A stage that began just now may have found the lock held, and started no follower.
        if not follower.find_work():
            return


if __name__ == "__main__":
    main()
