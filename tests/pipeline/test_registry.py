"""Racks of the tiny pipeline in a real MLflow registry: found again, traced back, and asked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.artifacts.manifest import read
from stackwise.registry.registering import Registry
from stackwise.tracking.record import RECORDS, read_record
from tests.pipeline.inprocess import Changes, Pipeline, project

ROOT = Path(__file__).resolve().parents[2]
STORE = "sqlite:///mlflow.db"
TRACKED: Changes = {
    "tracking": {"enabled": True, "system_metrics": False},
    "fine_tune": {"clm": {"objective": "clm", "steps": 2}},
}
LEFT_OUT = ("report", "sample", "analyse", "score_samples")


def follow() -> str:
    """Feed MLflow from the records, to the end; returns the follower's log."""
    code = "from stackwise.tracking import follow; follow.IDLE = follow.POLL = 0.2; follow.main()"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline that has run and been followed."""
    with pytest.MonkeyPatch.context() as patch, project(tmp_path_factory.mktemp("registry")) as pipeline:
        patch.setattr("stackwise.tracking.record.git_commit", lambda: "c0ffee")
        patch.setattr("stackwise.tracking.record.Record._wake_follower", lambda self: None)  # one is started here
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_TRACKING_URI", STORE)
        pipeline.run(TRACKED, leave_out=LEFT_OUT)
        said = follow()
        assert "registered stackwise-fused/1" in said
        assert "registered stackwise-clm/1" in said
        yield pipeline


@pytest.fixture
def client(registered: Pipeline) -> Any:
    """Of the store."""
    from mlflow import MlflowClient

    return MlflowClient(STORE)


def experiment_of(client: Any) -> str:
    """Its id."""
    return str(client.get_experiment_by_name("stackwise").experiment_id)


def test_lineage(client: Any) -> None:
    fused, clm = (client.get_model_version(f"stackwise-{name}", "1") for name in ("fused", "clm"))
    stacks = [read(Path(f"artifacts/stacks/{k}"), "stack").digest for k in (0, 1)]
    tokens = read(Path("artifacts/tokens"), "tokens")
    assert fused.tags["stage"] == "fuse"
    assert fused.tags["git_commit"] == "c0ffee"
    (model,) = client.search_logged_models([experiment_of(client)], f"tags.digest = '{fused.tags['digest']}'")
    inputs = {key: value for key, value in model.tags.items() if key.startswith("input.")}
    assert inputs == {
        **{f"input.training.{k}": f"artifacts/stacks/{k} {digest}" for k, digest in enumerate(stacks)},
        "input.tokens": f"artifacts/tokens {tokens.digest}",
    }
    assert all(value.split()[1][:12] in fused.description for value in inputs.values())
    assert not inputs.keys() & fused.tags.keys()
    assert fused.tags["data.corpus"] == read(Path("artifacts/corpus"), "corpus").digest
    assert fused.tags["digest"] == read(Path("artifacts/fused"), "rack").digest
    assert clm.tags["made_from"] == "models:/stackwise-fused/1"
    assert client.get_run(fused.run_id).data.tags["stage"] == "fuse"
    assert client.get_model_version_by_alias("stackwise-fused", f"config-{fused.tags['config'][:8]}").version == 1


def test_what_was_measured_stands_beside_the_model(client: Any) -> None:
    experiment = client.get_experiment_by_name("stackwise")
    models = {m.name: m for m in client.search_logged_models([experiment.experiment_id])}
    measured = {metric.key: metric.value for metric in models["fused"].metrics}
    assert (
        measured["nelbo.bits_per_byte"] == json.loads(Path("metrics/fused.json").read_text())["nelbo"]["bits_per_byte"]
    )
    assert any(metric.key == "next_token.bits_per_byte" for metric in models["clm"].metrics)


def test_weights_are_not_copied(client: Any) -> None:
    source = Path(client.get_model_version("stackwise-fused", "1").source)
    assert (source / "rack/model.safetensors").samefile("artifacts/fused/model.safetensors")
    assert not (source / "code/stackwise/api.py").samefile(ROOT / "stackwise/api.py")


def test_the_same_rack_again_is_the_same_version(registered: Pipeline, client: Any) -> None:
    registered.forget()
    registered.run({**TRACKED, "tracking.experiment": "stackwise"}, leave_out=LEFT_OUT)
    assert "registered stackwise-fused/1" in follow()
    assert [v.version for v in client.search_model_versions("name = 'stackwise-fused'")] == [1]
    other = {**TRACKED, "fine_tune.clm.lr": 0.1}
    registered.run(other, leave_out=LEFT_OUT)
    assert "registered stackwise-clm/2" in follow()
    assert [v.version for v in client.search_model_versions("name = 'stackwise-fused'")] == [1]


def test_a_rack_that_has_been_replaced_is_not_registered(registered: Pipeline, client: Any) -> None:
    record = next(path for path in sorted(RECORDS.glob("*-fuse-*.jsonl")))
    events = read_record(record)
    changed = [{**e, "digest": "0" * 64} if e["event"] == "output" else e for e in events]
    experiment = client.get_experiment_by_name("stackwise")
    with pytest.raises(Exception, match=r"artifacts/fused: not registered, because it has been replaced"):
        Registry(client, "stackwise", experiment.experiment_id).register("none", changed)


def test_a_store_elsewhere_gets_all_files(
    registered: Pipeline, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mlflow.utils.uri.is_local_uri", lambda *_, **__: False)
    experiment_id = client.create_experiment("elsewhere", tmp_path.as_uri())
    run = client.create_run(experiment_id)
    events = read_record(next(path for path in sorted(RECORDS.glob("*-fuse-*.jsonl"))))
    assert Registry(client, "elsewhere", experiment_id).register(run.info.run_id, events) == ["elsewhere-fused/1"]
    (weights,) = tmp_path.rglob("rack/model.safetensors")
    assert weights.read_bytes() == Path("artifacts/fused/model.safetensors").read_bytes()
    assert not list(Path("artifacts").glob(".registered*"))


def test_predictions(registered: Pipeline, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real command, of a model that has left its project; the same prompts, the same seed, the same answers."""
    moved = shutil.copytree(client.get_model_version("stackwise-fused", "1").source, tmp_path / "model")
    request = {"inputs": {"prompt": ["ab[MASK:3]c", "ab"]}, "params": {"new_tokens": 2, "seed": 3}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = ["-m", "mlflow", "models", "predict", "-m", str(moved), "-t", "json", "--env-manager", "local"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command, "-i", str(tmp_path / "request.json")],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    answers = json.loads(done.stdout[done.stdout.index("{") :])["predictions"]
    assert answers[0]["text"].startswith("ab")
    assert answers[1]["text"] == "ab" + answers[1]["made"]
    assert all(answer["score"] < 0 for answer in answers)

    import mlflow
    import pandas as pd

    monkeypatch.setattr(sys, "path", list(sys.path))  # a model puts its code there
    prompts = pd.DataFrame(request["inputs"])
    here = mlflow.pyfunc.load_model("models:/stackwise-fused/1").predict(prompts, params=request["params"])
    assert here.to_dict("records") == answers
    clm = mlflow.pyfunc.load_model("models:/stackwise-clm/1")
    assert clm.input_example is not None
    (said,) = clm.predict(clm.input_example, params={"new_tokens": 4}).to_dict("records")
    assert said["text"] == clm.input_example["prompt"][0] + said["made"]
