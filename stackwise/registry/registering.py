"""Trained racks become versions of registered models. The process that feeds MLflow does it, see `tracking.follow`.

A rack that stage `fuse` wrote to `artifacts/fused` is a version of the model `<experiment>-fused`. A version is found
by the digest of its files: the same weights made again, by whatever configuration or engine, are the same version.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.artifacts.code import PROJECT
from stackwise.artifacts.manifest import MANIFEST, Artifact, digest_json
from stackwise.errors import UserError
from stackwise.registry.interface import MODELS, RACK, example, signature

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CONTENT, DIGEST, CONFIG = "content", "digest", "config"
"""Tags: of the files alone; of the manifest, which names parameters and inputs too; of all parameters."""
REQUIREMENTS = (
    *("mlflow", "numpy", "pandas", "peft", "pydantic", "pyyaml", "safetensors", "tokenizers", "torch"),
    "transformers",
)
"""What a registered model needs besides the code that it brings along; at the versions of this environment."""
_INPUT = "input."
"""What tags of inputs begin with."""
Event = Mapping[str, Any]


@dataclass(frozen=True)
class _Rack:
    """A rack on disk, of which the manifest alone has been read: its gigabytes are verified by whoever loads it."""

    artifact: Artifact
    content: str
    """Digest of its files, whatever they were made from."""
    files: tuple[str, ...]

    @classmethod
    def of(cls, output: Event) -> "_Rack":
        """The one that a record names.

        Raises:
            UserError: it has been replaced since.
        """
        path = Path(output["path"])
        try:
            raw = (path / MANIFEST).read_bytes()
        except OSError:
            raw = b""
        if hashlib.sha256(raw).hexdigest() != output["digest"]:
            raise UserError(f"{path}: not registered, because it has been replaced or removed since it was made")
        manifest = json.loads(raw)
        artifact = Artifact(path, output["kind"], output["digest"], manifest["facts"], manifest["inputs"])
        return cls(artifact, digest_json(manifest["files"]), (*manifest["files"], MANIFEST))


class Registry:
    """The model registry of a tracking store."""

    def __init__(self, client: "MlflowClient", experiment: str, experiment_id: str) -> None:
        self._client = client
        self._experiment, self._experiment_id = experiment, experiment_id

    def register(self, run_id: str, events: Sequence[Event]) -> list[str]:
        """Register the racks that an execution has made, once.

        Args:
            run_id: its run.
            events: its record.

        Returns:
            `NAME/VERSION` of each.

        Raises:
            UserError: a rack is no longer what the record says.
        """
        outputs = [event for event in events if event["event"] == "output" and event["kind"] in MODELS]
        return [self._register(run_id, _Rack.of(output), events) for output in outputs]

    def log_metrics(self, run_id: str, events: Sequence[Event]) -> None:
        """Show what an execution has measured of a registered rack beside it, too."""
        from mlflow.entities import LoggedModelInput, Metric

        measured = [e for e in events if e["event"] == "input" and e["role"] == "model"]
        metrics = [
            # The name of the model is left out: versions and models are compared by the same names.
            (key.partition(".")[2], float(value), int(event["time"] * 1000))
            for event in events
            if event["event"] == "result"
            for key, value in event["values"].items()
            if value is not None
        ]
        model = self._logged(DIGEST, measured[0]["digest"]) if measured and metrics else None
        if model is not None:
            self._client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
            self._client.log_batch(run_id, [Metric(*metric, 0, model_id=model.model_id) for metric in metrics])

    def _register(self, run_id: str, rack: _Rack, events: Sequence[Event]) -> str:
        from mlflow import MlflowException

        name = f"{self._experiment}-{rack.artifact.path.name}"
        try:
            self._client.get_registered_model(name)
        except MlflowException:
            self._client.create_registered_model(name, description=f"`{rack.artifact.path}` of the pipeline.")
        tags = dict(self._lineage(rack, events))
        found = self._find(CONTENT, rack.content, name)
        if found is None:
            found = self._create(name, run_id, rack, tags)
        else:  # the same weights from elsewhere: what is told of them is the latest
            for key, value in _of_version(tags).items():
                self._client.set_model_version_tag(name, found.version, key, value)
            self._client.update_model_version(name, found.version, _description(tags))
            if (model := self._logged(CONTENT, rack.content)) is not None:
                self._client.set_logged_model_tags(model.model_id, tags)
        self._client.set_registered_model_alias(name, f"config-{tags[CONFIG][:8]}", found.version)
        return f"{name}/{found.version}"

    def _create(self, name: str, run_id: str, rack: _Rack, tags: Mapping[str, str]) -> "ModelVersion":
        from mlflow.entities import LoggedModelOutput
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

        client = self._client
        facts = {k: str(v) for k, v in rack.artifact.facts.items() if isinstance(v, str | int | float)}
        model = client.create_logged_model(
            self._experiment_id, rack.artifact.path.name, run_id, dict(tags), facts, model_type=rack.artifact.kind
        )
        self._upload(model, rack, run_id)
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        made = client.create_model_version(
            name,
            model.artifact_location,
            run_id,
            _of_version(tags),
            description=_description(tags),
            model_id=model.model_id,
        )
        versions = json.dumps([{"name": name, "version": made.version}])
        client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: versions})  # where the UI looks
        return made

    def _upload(self, model: "LoggedModel", rack: _Rack, run_id: str) -> None:
        """The model as MLflow knows it. In a store on this disk the weights are hard links: no byte is copied."""
        from mlflow.utils.file_utils import local_file_uri_to_path
        from mlflow.utils.uri import is_local_uri

        if is_local_uri(model.artifact_location, is_tracking_or_registry_uri=False):
            _write(Path(local_file_uri_to_path(model.artifact_location)), rack, model.model_id, run_id)
            return
        with tempfile.TemporaryDirectory(dir=rack.artifact.path.parent, prefix=".registered.") as directory:
            whole = Path(directory) / "model"
            _write(whole, rack, model.model_id, run_id)
            self._client.log_model_artifacts(model.model_id, str(whole))

    def _lineage(self, rack: _Rack, events: Sequence[Event]) -> Iterator[tuple[str, str]]:
        """Tags that say what a rack was made from: which stacks, which data, which commit, which parameters."""
        start = next(event for event in events if event["event"] == "start")
        yield from ((CONTENT, rack.content), (DIGEST, rack.artifact.digest), (CONFIG, start["config"]))
        yield "stage", start["stage"]
        if start["git"]:
            yield "git_commit", start["git"]
        for event in events:
            if event["event"] != "input":
                continue
            yield f"{_INPUT}{event['role']}", f"{event['path']} {event['digest']}"
            if event["kind"] in MODELS and (base := self._find(DIGEST, event["digest"])) is not None:
                yield "made_from", f"models:/{base.name}/{base.version}"
            if event["role"] == "tokens":
                yield from _data(Path(event["path"]), event["digest"])

    def _find(self, tag: str, value: str, name: str | None = None) -> "ModelVersion | None":
        """The version with a tag, of any model or of one."""
        query = f"tags.`{tag}` = '{value}'" + (f" and name = '{name}'" if name else "")
        mine = (v for v in self._client.search_model_versions(query) if v.name.startswith(f"{self._experiment}-"))
        return next(mine, None)

    def _logged(self, tag: str, value: str) -> "LoggedModel | None":
        """The model with a tag, as it was logged: what versions are made of."""
        found = self._client.search_logged_models([self._experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
        return next(iter(found), None)


def _data(tokens: Path, digest: str) -> Iterator[tuple[str, str]]:
    """What text a rack has learned from: the digest of the corpus that its tokens were made of."""
    try:
        raw = (tokens / MANIFEST).read_bytes()
    except OSError:
        return
    if hashlib.sha256(raw).hexdigest() == digest:
        for role, origin in json.loads(raw)["inputs"].items():
            yield f"data.{role}", origin


def _write(directory: Path, rack: _Rack, model_id: str, run_id: str) -> None:
    """A model in MLflow's format: the rack, this project's code, signature, example and requirements."""
    import mlflow.pyfunc
    from mlflow.models import Model

    shutil.rmtree(directory, ignore_errors=True)  # of a follower that was killed
    directory.parent.mkdir(parents=True, exist_ok=True)
    mlflow.pyfunc.save_model(
        directory,
        loader_module="stackwise.registry.serving",
        code_paths=[str(PROJECT / "stackwise")],
        mlflow_model=Model(run_id=run_id, model_id=model_id),
        signature=signature(),
        input_example=example(rack.artifact.facts),
        pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in REQUIREMENTS],
    )
    for name in rack.files:
        target = directory / RACK / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(rack.artifact.path / name, target)
    artifact = rack.artifact  # it was there all the while
    _Rack.of({"path": artifact.path, "kind": artifact.kind, "digest": artifact.digest})


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy on another file system. Files of artifacts are replaced, never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _of_version(tags: Mapping[str, str]) -> dict[str, str]:
    """Those that a version has, too: a table of versions shows all of them, and a rack may have a hundred inputs."""
    return {key: value for key, value in tags.items() if not key.startswith(_INPUT)}


def _description(tags: Mapping[str, str]) -> str:
    """What a person reads first on a version's page."""
    inputs = {key.removeprefix(_INPUT): value for key, value in tags.items() if key.startswith(_INPUT)}
    lines = [f"Made by stage {tags['stage']} at commit {tags.get('git_commit', 'unknown')[:12]} from:", ""]
    for role, value in inputs.items():
        path, digest = value.rsplit(" ", 1)
        more = f", version {tags['made_from']}" if role == "model" and "made_from" in tags else ""
        lines.append(f"- {role}: `{path}` (`{digest[:12]}`){more}")
    return "\n".join(lines)
