"""Growing a rack in a directory, and keeping its weights."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise.artifacts.manifest import Artifact, digest_json, publish, read
from stackwise.config.params import UNTRACKED
from stackwise.errors import UserError
from stackwise.growth.phases import Phase
from stackwise.growth.racks import load_rack
from stackwise.growth.run import GrowthRun, rack_of
from stackwise.growth.stacks import KIND as TRAINING
from stackwise.growth.stacks import Training
from stackwise.interactive.configuring import StackWiseConfig
from stackwise.interactive.loading import ProgressiveDataLoader
from stackwise.interactive.watching import Silent
from stackwise.model.rack import Rack
from stackwise.precision.trunk import KIND as TRUNK
from stackwise.precision.trunk import TrunkStack
from stackwise.training.device import set_up
from stackwise.training.loop import Watcher

RECORD = "full_precision"
"""Kind and directory of what `save_full_precision` writes."""
CONFIG = "config.json"


class ProgressiveTrainer:
    """Trains all phases of the regime in a config, each run in a directory of its own, `directory/run_id`.

    There it leaves what the pipeline leaves, under the same names: `artifacts/tokens`, `artifacts/stacks/...`,
    `artifacts/trunk/...`, `artifacts/fused`, and loss curves in `metrics/loss`. Threads and determinism of the process
    are set as `compute` says.
    """

    def __init__(
        self, config: StackWiseConfig, directory: str | Path = "runs", *, tokens: str | Path | None = None
    ) -> None:
        """
        Args:
            config: everything.
            directory: where runs lie.
            tokens: a tokens artifact that is there already (None: each run makes its corpus and its tokens).
        """
        self.config = config
        self._directory = Path(directory)
        self._tokens = None if tokens is None else Path(tokens)

    @property
    def default_run_id(self) -> str:
        """The name of a run that is not given one: a digest of the config."""
        return digest_json(self._identity())[:12]

    def train_rack(self, run_id: str | None = None, *, watcher: Watcher | None = None) -> Rack:
        """Train all phases, and fuse what they leave into one rack, in full precision.

        What a run of this name has made already is taken as it is; a training that was interrupted goes on.

        Args:
            run_id: name of the run (None: `default_run_id`).
            watcher: is told how each training goes.

        Raises:
            UserError: the run has another config, or the machine cannot do what is asked.
        """
        run = self.run(run_id)
        for phase in run.phases:
            run.train(phase, watcher or Silent())
        return load_rack(run.fused().path).eval()

    def data_loader(self, run_id: str | None = None, *, stack: int, sweep: int = 0) -> ProgressiveDataLoader:
        """The batches of one training of a run, of a cached boundary where it reads one.

        Args:
            run_id: name of the run.
            stack: whose training; of several that are added together the highest.
            sweep: 0 while the rack grows; which sweep over it, from 1.

        Raises:
            UserError: there is no such training, or one that it goes on from has not been done.
        """
        run = self.run(run_id)
        return ProgressiveDataLoader(run.inputs(_phase(run, stack, sweep)), device=run.device)

    def save_full_precision(self, run_id: str | None = None) -> Path:
        """Copy all that the finished rack is made from to `full_precision` in the run's directory, with digests.

        Returns:
            Where it lies.

        Raises:
            UserError: the run is not complete.
        """
        run = self.run(run_id)
        trainings, trunk, order = run.parts()
        parts = {TRAINING: [t.artifact for t in trainings], TRUNK: [stack.artifact for stack in trunk]}
        place = run.directory / RECORD
        with publish(place, kind=RECORD, params=self._identity()) as draft:
            for artifact in (part for group in parts.values() for part in group):
                shutil.copytree(artifact.path, draft.directory / artifact.path.relative_to(run.directory))
            paths = {kind: [str(a.path.relative_to(run.directory)) for a in group] for kind, group in parts.items()}
            draft.facts |= {"order": list(order), **paths}
        return place

    def validate_full_precision(self, run_id: str | None = None) -> dict[str, str]:
        """Hold every saved file against its digest.

        Returns:
            The digest of each saved artifact, by its path in the run.

        Raises:
            UserError: nothing was saved, or a file is missing or damaged, which it names.
        """
        name = self._name(run_id)
        record = self._record(name)
        artifacts = {path: self._saved(name, path, kind) for path, kind in _paths(record)}
        return {path: artifact.digest for path, artifact in artifacts.items()}

    def restore_full_precision(self, run_id: str | None = None) -> list[Path]:
        """Put all that was saved back into the run, in place of what is there.

        Returns:
            What was put back.

        Raises:
            UserError: as `validate_full_precision`.
        """
        name, restored = self._name(run_id), []
        for path, _ in _paths(self._record(name)):
            target = self._directory / name / path
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self._directory / name / RECORD / path, partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            restored.append(target)
        return restored

    def reconstruct_rack(self, run_id: str | None = None) -> Rack:
        """The finished rack from what was saved: bit for bit what `train_rack` returned, if adapters are merged.

        Raises:
            UserError: as `validate_full_precision`.
        """
        name = self._name(run_id)
        record = self._record(name)
        trainings = [Training(self._saved(name, path, TRAINING)) for path in record.facts[TRAINING]]
        trunk = [TrunkStack(self._saved(name, path, TRUNK)) for path in record.facts[TRUNK]]
        return rack_of(self.config.params, trainings, trunk, record.facts["order"]).eval()

    def run(self, run_id: str | None = None) -> GrowthRun:
        """The run of a name; a new one writes down its config.

        Raises:
            UserError: the run has another config, or the name cannot be that of a directory.
        """
        params, name = self.config.params, self._name(run_id)
        directory, identity = self._directory / name, self._identity()
        file = directory / CONFIG
        if file.exists():
            _check_same(name, json.loads(file.read_text()), identity)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n")
        device = set_up(params.compute, threads=params.compute.threads, seed=params.seed)
        return GrowthRun(params, directory, device=device, tokens=self._tokens)

    def _name(self, run_id: str | None) -> str:
        name = self.default_run_id if run_id is None else run_id
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UserError(
                f"run_id = {name}: expected letters, digits, `_`, `-` and `.`, because it names a directory"
            )
        return name

    def _identity(self) -> dict[str, Any]:
        """The parameters that change results."""
        return json.loads(json.dumps(self.config.params.model_dump(exclude=set(UNTRACKED))))

    def _record(self, name: str) -> Artifact:
        """What was saved of a run, as a whole."""
        return self._saved(name, "", RECORD)

    def _saved(self, name: str, path: str, kind: str) -> Artifact:
        """An artifact among what was saved of a run."""
        remedy = f"save_full_precision({name!r}) saves it again, if the run is still whole"
        return read(self._directory / name / RECORD / path, kind, remedy=remedy)


def _paths(record: Artifact) -> list[tuple[str, str]]:
    """The paths of the artifacts in a record, each with its kind."""
    return [(path, kind) for kind in (TRAINING, TRUNK) for path in record.facts[kind]]


def _phase(run: GrowthRun, stack: int, sweep: int) -> Phase:
    trained = [phase for phase in run.phases if not phase.imported]
    for phase in trained:
        if (phase.stack, phase.sweep) == (stack, sweep):
            return phase
    known = ", ".join(f"({phase.stack}, {phase.sweep})" for phase in trained)
    raise UserError(f"stack = {stack}, sweep = {sweep}: no training of this regime; expected one of {known}")


def _check_same(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str = "") -> None:
    for key in sorted(theirs.keys() | ours.keys()):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(name, a, b, f"{path}{key}.")
        elif a != b:
            raise UserError(
                f"run_id = {name}: the run of this name has {path}{key} = {json.dumps(a)}, the config has "
                f"{json.dumps(b)}; give another run_id, or none"
            )
