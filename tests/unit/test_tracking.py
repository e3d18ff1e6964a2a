"""Records, the follower, and what a real MLflow store holds afterwards; kills and an unreachable server."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.artifacts.manifest import digest_json
from stackwise.tracking.follow import flatten
from stackwise.tracking.record import FOLLOWER_LOCK, FOLLOWER_LOG, RECORDS, Record, read_record

ROOT = Path(__file__).resolve().parents[2]
STEPS = 1600
"""More than are logged at once."""
DIGEST = digest_json("tokens")
HASTE = "from stackwise.tracking import follow; follow.IDLE = follow.POLL = 0.2; follow.main()"
"""The follower, which ends sooner than it does for people."""


def facts(lr: float = 3e-3, stack: int | None = None, **tracking: Any) -> dict[str, Any]:
    """What a stage tells of itself."""
    params = {"stack": {"lr": lr, "init": "copy"}, "seed": 0}
    pipeline = {
        **params,
        "n_stacks": 2,
        "stacks": [{}, {"lr": 0.1}],
        "time steps": {"fractions": [0.1, 0.5], "depth": None},
        "many": {f"k{i}": i for i in range(150)},
        "long": "x" * 7000,
    }
    tracking = {"enabled": True, "uri": None, "experiment": "stackwise", "system_metrics": False, **tracking}
    config = digest_json(pipeline)
    return {"stack": stack, "params": params, "pipeline": pipeline, "config": config, "tracking": tracking}


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for what another process does; long enough for a busy machine."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited for two minutes in vain")


def is_unfollowed() -> bool:
    """Whether no follower is there."""
    with (RECORDS / FOLLOWER_LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def progress(record: Record) -> dict[str, Any]:
    """How far a record has been logged."""
    kept = record.path.with_suffix(".followed")
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"done": False, "offset": 0}
    return found


def start_follower(code: str = HASTE, **environment: str) -> subprocess.Popen[str]:
    """Start the follower, with its log on a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def follow(code: str = HASTE, **environment: str) -> str:
    """Run the follower to its end; returns its log."""
    process = start_follower(code, **environment)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return log


class Store:
    """What an MLflow store holds."""

    def __init__(self, uri: str = "sqlite:///mlflow.db") -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(uri.replace("sqlite:///", f"sqlite:///{Path.cwd()}/"))
        experiment = self.client.get_experiment_by_name("stackwise")
        assert experiment is not None
        self.experiment = experiment
        runs = list(self.client.search_runs([experiment.experiment_id]))
        self.parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
        self.children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]

    def child(self, stage: str) -> Any:
        """The one execution of a stage."""
        (child,) = (r for r in self.children if r.data.tags["stage"] == stage)
        return child

    def parent(self, lr: float) -> Any:
        """The one pipeline with a learning rate."""
        (parent,) = (r for r in self.parents if r.data.params["stack.lr"] == str(lr))
        return parent

    def history(self, run: Any, name: str) -> list[tuple[int, float]]:
        """All values of a metric, with their steps."""
        found = self.client.get_metric_history(run.info.run_id, name)
        return sorted((metric.step, metric.value) for metric in found)


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    """No settings of the machine's owner, no telemetry."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without experiments: making one takes a second."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stored_project(project: Path, empty_store: Path) -> Path:
    """A project that has an empty store."""
    shutil.copy(empty_store, project / "mlflow.db")
    return project


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose stages have run, and were followed by a process that their records started."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("pipelines")
        patch.chdir(directory)
        patch.setattr("stackwise.tracking.record.git_commit", lambda: "c0ffee")
        train = Record("train", facts(stack=1), follow=True)
        train.add("input", role="tokens", path="artifacts/tokens", kind="tokens", digest=DIGEST)
        train.add("input", role="below", path="artifacts/stack_0", kind="stack", digest=digest_json("below"))
        train.add("resumed", step=5)
        for first in range(0, STEPS, 400):
            train.add("steps", first=first, values={"loss": [float(i) for i in range(first, first + 400)]})
        train.add("metrics", step=7, values={"validation": 2.5, "lr": None, "grad_norm": float("nan")})
        train.add("output", role="stack", path="artifacts/stack_1", kind="stack", digest=digest_json("out"))
        train.add("result", values={"tokens_per_second": 1e4})
        train.add("text", file="samples.txt", text="Once\nupon a time \u20ac\n")
        train.close("finished", peak_memory=12345, modules=["stackwise"])
        for k in range(3):
            evaluate = Record(f"evaluate_{k}", facts(stack=k), follow=True)
            evaluate.add("depth", stack=k, values={"nelbo": 3.0 - k})
            evaluate.add("result", values={"fused.nelbo_bits_per_byte": 1.0 + k, "documents": 9})
            evaluate.close("finished", peak_memory=1)
        Record("again", facts(), follow=True).close("finished", peak_memory=None)  # the same configuration
        Record("other", facts(lr=1e-3), follow=True).close("failed", peak_memory=1)
        code = "import os, sys, json; from stackwise.tracking.record import Record\n"
        code += "r = Record('killed', json.loads(sys.argv[1]), follow=True)\n"
        code += "r.add('metrics', step=1, values={'a': 1})\n"
        code += 'r._file.write(\'{"event": "met\'); r._file.flush(); os.kill(os.getpid(), 9)'
        command = [sys.executable, "-c", code, json.dumps(facts(lr=2e-3))]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        wait_until(lambda: len(list(RECORDS.glob("*.jsonl"))) == 7)
        wait_until(lambda: all(p.with_suffix(".followed").exists() for p in RECORDS.glob("*.jsonl")))
        wait_until(lambda: all('"done": true' in p.read_text() for p in RECORDS.glob("*.followed")))
        yield directory
        patch.chdir(directory)
        wait_until(is_unfollowed)


@pytest.fixture
def store(pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of that project."""
    monkeypatch.chdir(pipelines)
    return Store()


def test_child_has_parameters_tags_and_metrics(store: Store) -> None:
    child = store.child("train")
    assert (child.info.run_name, child.info.status) == ("train", "FINISHED")
    assert child.data.params == {"stack.lr": "0.003", "stack.init": "copy", "seed": "0"}
    tags = child.data.tags
    assert tags["mlflow.parentRunId"] == store.parent(3e-3).info.run_id
    assert {"stack": "1", "status": "finished", "resumed_from": "5"}.items() <= tags.items()
    assert {"input.tokens": DIGEST, "output.stack": digest_json("out")}.items() <= tags.items()
    assert tags["config"] == facts()["config"]
    assert tags["git_commit"] == store.parent(3e-3).data.tags["git_commit"] == "c0ffee"
    assert store.history(child, "loss") == [(i, float(i)) for i in range(STEPS)]
    assert store.history(child, "validation") == [(7, 2.5)]
    assert "lr" not in child.data.metrics
    assert child.data.metrics["peak_memory_bytes"] == 12345
    assert child.data.metrics["tokens_per_second"] == 1e4
    assert child.data.metrics["duration_seconds"] > 0


def test_child_has_its_dataset(store: Store) -> None:
    (found,) = store.child("train").inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("tokens", DIGEST[:36])
    assert json.loads(found.dataset.source) == {"uri": "artifacts/tokens"}


def test_child_has_its_texts(store: Store, tmp_path: Path) -> None:
    found = store.client.download_artifacts(store.child("train").info.run_id, "samples.txt", str(tmp_path))
    assert Path(found).read_text() == "Once\nupon a time \u20ac\n"


def test_runs_nest_one_deep_with_one_parent_for_each_configuration(store: Store) -> None:
    assert len(store.children) == 7
    assert len(store.parents) == 3
    same = store.parent(3e-3)
    assert same.info.run_name == f"config-{facts()['config'][:8]}"
    parents = {c.data.tags["mlflow.parentRunId"] for c in store.children}
    assert parents == {p.info.run_id for p in store.parents}
    children = [c for c in store.children if c.data.tags["mlflow.parentRunId"] == same.info.run_id]
    assert {c.info.run_name for c in children} == {"train", "again", *(f"evaluate_{k}" for k in range(3))}


def test_parents_differ_in_nothing_but_the_parameter(store: Store) -> None:
    one, other = store.parent(3e-3).data.params, store.parent(1e-3).data.params
    assert {key for key in one | other if one.get(key) != other.get(key)} == {"stack.lr"}
    assert one["many.k149"] == "149"
    assert one["long"] == "x" * 6000
    assert (one["stacks.0"], one["stacks.1.lr"]) == ("{}", "0.1")
    assert (one["time steps.fractions"], one["time steps.depth"]) == ("[0.1, 0.5]", "null")


def test_parent_shows_curves_over_depth_and_what_was_measured_on_models(store: Store) -> None:
    parent = store.parent(3e-3)
    assert store.history(parent, "nelbo") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert parent.data.metrics.keys() == {"nelbo", "fused.nelbo_bits_per_byte"}
    assert parent.data.metrics["fused.nelbo_bits_per_byte"] == 3.0


def test_statuses(store: Store) -> None:
    assert store.child("killed").info.status == "KILLED"
    assert store.child("killed").data.tags["status"] == "killed"
    assert store.history(store.child("killed"), "a") == [(1, 1.0)]
    assert store.child("other").info.status == "FAILED"
    assert [store.parent(lr).info.status for lr in (3e-3, 1e-3, 2e-3)] == ["FINISHED", "FAILED", "KILLED"]


def test_followed_project_holds_nothing_surprising(pipelines: Path) -> None:
    assert {path.name for path in pipelines.iterdir()} == {".stackwise", "mlflow.db", "mlruns"}
    assert (pipelines / RECORDS / FOLLOWER_LOG).read_text() == ""


def test_what_a_killed_follower_repeats_changes_nothing(
    pipelines: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been killed just before it kept the ids of the runs that it had created and filled."""
    shutil.copytree(pipelines, project / "copy")
    monkeypatch.chdir(project / "copy")
    for kept in RECORDS.glob("*.followed"):
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "run": "", "offset": 0, "done": False}))
    before = content(Store())
    assert follow() == ""
    assert content(Store()) == before


def content(store: Store) -> dict[str, Any]:
    """All values of all metrics, parameters, tags and statuses."""
    return {
        run.info.run_id: (
            [(name, store.history(run, name)) for name in sorted(run.data.metrics) if name != "grad_norm"],
            run.data.params,
            run.data.tags,
            run.info.status,
        )
        for run in store.children + store.parents
    }


def test_killed_follower_is_continued(project: Path, empty_store: Path) -> None:
    shutil.copytree(empty_store.parent, "named")
    haste = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
    record = Record("train", facts(uri="sqlite:///named/mlflow.db", system_metrics=True), follow=False)
    record.add("metrics", step=0, values={"loss": 0.0})
    first = start_follower(**haste)
    wait_until(lambda: progress(record)["offset"])
    assert follow() == ""  # a second one leaves at once: this record is open
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert Store("sqlite:///named/mlflow.db").child("train").info.status == "RUNNING"
    record.add("metrics", step=1, values={"loss": 1.0})
    second = start_follower(**haste)
    cpu = "system/cpu_utilization_percentage"
    wait_until(lambda: cpu in Store("sqlite:///named/mlflow.db").children[0].data.metrics)
    record.add("metrics", step=2, values={"loss": 2.0})
    record.close("finished", peak_memory=1)
    assert second.communicate(timeout=120)[0] == ""
    store = Store("sqlite:///named/mlflow.db")
    assert len(store.parents) == 1
    assert store.history(store.child("train"), "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert store.child("train").info.status == "FINISHED"
    assert progress(record)["done"]


def test_unreachable_server_reaches_no_stage_and_loses_nothing(stored_project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log = RECORDS / FOLLOWER_LOG
    record = Record("train", facts(uri=f"http://127.0.0.1:{port}"), follow=True)
    other = Record("other", facts(uri=f"http://127.0.0.1:{port}"), follow=True)
    wait_until(lambda: log.read_text())
    record.add("metrics", step=0, values={"loss": 0.0})
    for open_record in (record, other):
        open_record.close("finished", peak_memory=1)
    wait_until(is_unfollowed)
    (line,) = log.read_text().splitlines()
    assert f"{record.path.name}: not logged to http://127.0.0.1:{port}" in line
    assert [event["event"] for event in read_record(record.path)] == ["start", "metrics", "end"]
    assert follow(MLFLOW_TRACKING_URI="sqlite:///mlflow.db") == ""  # which comes before the section's
    assert {child.info.status for child in Store().children} == {"FINISHED"}
    assert len(Store().children) == 2


def test_follower_of_a_removed_project_leaves_quietly(project: Path, empty_store: Path) -> None:
    project = project / "project"
    shutil.copytree(empty_store.parent, project)
    os.chdir(project)
    record = Record("train", facts(), follow=False)
    process = start_follower()
    wait_until(lambda: progress(record)["offset"])
    os.chdir(project.parent)
    shutil.rmtree(project)
    assert process.communicate(timeout=120)[0] == ""
    assert process.returncode == 0
    assert not project.exists()


def test_record_that_begins_while_the_follower_leaves_is_followed(project: Path) -> None:
    """Such a record finds the lock held, so it starts no follower."""
    Record("early", facts(enabled=False), follow=False)
    late = f"""
import json
from stackwise.tracking import follow
from stackwise.tracking.record import Record
follow.IDLE = 0.2
records = [{json.dumps(facts(uri="nonsense://nowhere"))!r}]
follow_to_the_end = follow.Follower.follow
def follow_and_be_late(self, lock):
    went_well = follow_to_the_end(self, lock)
    if records:
        Record("late", json.loads(records.pop()), follow=True).close("finished")
    return went_well
follow.Follower.follow = follow_and_be_late
follow.main()
"""
    assert "not logged to nonsense://nowhere" in follow(late)
    assert not (RECORDS / FOLLOWER_LOG).exists()  # no other was started


def test_follower_leaves_a_directory_that_was_made_anew_to_another(project: Path) -> None:
    Record("old", facts(enabled=False), follow=False)
    process = start_follower("from stackwise.tracking import follow; follow.IDLE = 1e9; follow.main()")
    wait_until((RECORDS / FOLLOWER_LOCK).exists)
    shutil.rmtree(RECORDS)
    Record("new", facts(enabled=False), follow=False)
    assert process.communicate(timeout=120)[0] == ""
    assert process.returncode == 0


def test_tracking_that_is_off_starts_nothing_and_is_not_caught_up(project: Path) -> None:
    record = Record("train", facts(enabled=False), follow=False)
    record.add("metrics", step=0, values={"loss": 0.0})
    record.close("finished")
    assert [path for path in project.rglob("*") if path.is_file()] == [project / record.path]
    assert follow() == ""
    assert not (project / "mlflow.db").exists()


def test_newest_records_are_kept(project: Path) -> None:
    names = [Record(f"stage_{i}", facts(enabled=False), follow=False).path.name for i in range(5)]
    (RECORDS / names[0]).with_suffix(".followed").write_text("{}")
    follow(HASTE.replace("follow.main", "follow.KEEP = 2; follow.main"))
    assert sorted(path.name for path in RECORDS.iterdir()) == [*sorted(names)[-2:], FOLLOWER_LOCK]


def test_trouble_with_some_records_does_not_touch_others(stored_project: Path) -> None:
    """Damage, a store that cannot be, and an experiment that its owner has deleted, all at once."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{stored_project}/mlflow.db")
    client.delete_experiment(client.create_experiment("stackwise"))
    RECORDS.mkdir(parents=True)
    (RECORDS / "20200101-000000-000-no-1.jsonl").write_text("[1]\n")
    (RECORDS / "20200101-000000-000-empty-1.jsonl").touch()
    nowhere = [Record(f"nowhere_{i}", facts(uri="nonsense://nowhere"), follow=False) for i in range(3)]
    for record in nowhere:
        record.close("finished")
    os.utime(nowhere[1].path, (0, 0))
    train = Record("train", facts(), follow=False)
    train._file.write('{"event": "metrics", "val{"event":\n')
    train.add("an event of tomorrow", value=1)
    train.add("metrics", step=1, values={"acc@1": 0.5})
    train.close("finished")

    lines = follow().splitlines()
    assert len(lines) == 3
    assert "20200101-000000-000-no-1.jsonl: not a record" in lines[0]
    assert f"{nowhere[0].path.name}: not logged to nonsense://nowhere:" in lines[1]
    assert "restored the deleted experiment stackwise" in lines[2]
    assert Store().child("train").data.metrics["acc_1"] == 0.5
    assert [progress(record)["done"] for record in nowhere] == [
        False,
        True,
        False,
    ]  # the old one is abandoned


def test_flatten_takes_dotted_and_nested_parameters() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d.e": True}) == {"a.b": "1", "a.c": "{}", "d.e": "true"}
    assert flatten({}) == {}
