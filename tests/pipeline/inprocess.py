"""A tiny pipeline whose stages run in this process, and what the tests ask of it."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from stackwise.config.params import load
from workflow.inprocess import Memory, digest, inside, outputs, planned
from workflow.stages import table

BASE: dict[str, Any] = {
    "seed": 0,
    "seq_len": 16,
    "data": {"source": "dummy", "dummy_documents": 12},
    "tokenizer": {"type": "byte", "vocab_size": None},
    "model": {"d_model": 16, "attention": {"n_heads": 2}, "mlp": {"hidden": 24}},
    "objective": {"variants": 2},
    "n_stacks": 2,
    "stack": {"blocks": 1, "steps": 4, "batch_size": 4, "lr": 1.0e-2, "init": "random"},
    "stacks": [{}, {}],
    "growth": {},
    "adapters": {},
    "optimizer": {"warmup": 0.0},
    "compute": {"dtype": "fp32", "threads": 1, "device": "cpu"},
    "trunk": {},
    "joint": {"batch_size": 4},
    "fine_tune": {
        "clm": {"objective": "clm", "steps": 2, "batch_size": 4},
        "mlm": {"objective": "mlm", "steps": 2, "batch_size": 4},
    },
    "evaluate": {"samples": 4, "draws": 1, "mask_rates": [0.5]},
    "analyse": {"samples": 2, "mask_rates": [0.5], "tokens": 8, "heads": 1},
    "samples": {"number": 1, "steps": 2},
    "export": {},
    "activations": {"shard_mb": 1},
    "checkpoint": {},
    "tracking": {"enabled": False},
}
SHOWING = ("sample", "score_samples", "analyse", "report")
"""Scripts of what is shown of the models."""
Changes = Mapping[str, Any]
"""Values by dotted path of params.yaml."""


class Pipeline:
    """A project whose stages are run here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._memory = Memory(root / ".memory")

    def run(self, changes: Changes, *, leave_out: tuple[str, ...] = SHOWING) -> dict[str, dict[str, str]]:
        """Bring everything up to date for `BASE` with `changes`, but for the stages of the scripts `leave_out`.

        Returns:
            For every stage the digests of the files that it makes; of an artifact those that its manifest lists,
            without the manifest itself, which names the parameters.
        """
        params, stages = planned(written(self.root / "params.yaml", changes))
        stages = [stage for stage in stages if stage.script not in leave_out]
        self._memory.bring(stages, params)
        return {s.name: {k: v for path in outputs(s) for k, v in contents(self.root / path).items()} for s in stages}

    def forget(self) -> None:
        """Put nothing back from memory: what runs next runs indeed."""
        shutil.rmtree(self.root / ".memory", ignore_errors=True)


def written(file: Path, changes: Changes) -> Path:
    """`file`, which now holds `BASE` with `changes`."""
    file.write_text(yaml.safe_dump(changed(BASE, changes)))
    return file


def changed(tree: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of params with other values at some dotted paths."""
    tree, changes = json.loads(json.dumps([tree, changes]))
    for path, value in changes.items():
        *parents, last = path.split(".")
        node: Any = tree
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(last) if isinstance(node, list) else last] = value
    return tree


def contents(path: Path) -> dict[str, str]:
    """Digests of the files of an artifact, or of a file. Of a boundary it is its identity."""
    if not path.is_dir():
        return {str(path): digest(path)}
    manifest = json.loads((path / "manifest.json").read_text())
    files = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest["files"]}
    return files or {"key": manifest["facts"]["key"]}


@contextmanager
def project(root: Path) -> Iterator[Pipeline]:
    """A pipeline in `root`, which is the current directory until the block ends."""
    with inside(root):
        yield Pipeline(root)


def downstream(first: str) -> set[str]:
    """A stage and all that use what it makes, directly or not, by the params.yaml of the current directory."""
    stages = [stage for stage in table(load("params.yaml")) if stage.script not in SHOWING]
    found: set[str] = {first}
    made: set[str] = set()
    for stage in stages:
        if stage.name == first or made & set(stage.inputs):
            found.add(stage.name)
            made |= {*outputs(stage)}
    return found
