"""Every value of every parameter of architecture and objective goes through the pipeline, and changes what it should.

The stages' own scripts run here one after the other in this process, as the table of stages calls them, on a tiny
configuration; what has run already with the same command, parameters and inputs is put back from memory, as DVC would.
"""

import contextlib
import hashlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stackwise.config.params import Params, load, view
from tests.conftest import COVERED
from workflow.stage import resolve
from workflow.stages import ALL, Stage, render, table

REPOSITORY = Path(__file__).resolve().parents[2]
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
    "optimizer": {"warmup": 0.0},
    "compute": {"dtype": "fp32", "threads": 1, "device": "cpu"},
    "trunk": {},
    "joint": {"batch_size": 4},
    "fine_tune": {"clm": {"steps": 2, "batch_size": 4}, "mlm": {"steps": 2, "batch_size": 4}},
    "evaluate": {"samples": 4, "draws": 1, "mask_rates": [0.5]},
    "report": {"samples": 1, "steps": 2},
    "activations": {"shard_mb": 1},
    "checkpoint": {},
    "tracking": {"enabled": False},
}
Changes = Mapping[str, Any]
"""Values by dotted path of params.yaml."""


class Pipeline:
    """A project whose stages are run here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._memory: dict[str, Path] = {}

    def run(self, changes: Changes) -> dict[str, dict[str, str]]:
        """Bring everything up to date for `BASE` with `changes`.

        Returns:
            For every stage the digests of the files that it makes; of an artifact those that its manifest lists,
            without the manifest itself, which names the parameters.
        """
        (self.root / "params.yaml").write_text(yaml.safe_dump(changed(BASE, changes)))
        params = load("params.yaml")
        stages = table(params)
        render(stages)
        made: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for stage in stages:
            if stage.name == "report":
                continue
            self._bring(stage, params, whole)
            outputs = (*stage.outputs, *stage.metrics, *stage.plots)
            whole |= {path: digest(self.root / path) for path in outputs}
            made[stage.name] = {k: v for path in outputs for k, v in contents(self.root / path).items()}
        return made

    def _bring(self, stage: Stage, params: Params, inputs: Mapping[str, str]) -> None:
        seen = params if ALL in stage.params else view(params, stage.params)
        key = json.dumps([stage.command, resolve(seen), [inputs.get(path, path) for path in stage.inputs]])
        outputs = (*stage.outputs, *stage.metrics, *stage.plots)
        memory = self._memory.get(key)
        for path in outputs:
            place = self.root / path
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if memory is None:
            call(stage.command)
            memory = self._memory[key] = self.root / ".memory" / str(len(self._memory))
            for path in outputs:
                copy(self.root / path, memory / path)
        else:
            for path in outputs:
                copy(memory / path, self.root / path)


def call(command: str) -> None:
    """Run a stage's script as its command does."""
    python, script, *arguments = command.split()
    assert python == "python"
    argv, path = sys.argv, sys.path.copy()
    said = io.StringIO()
    try:
        sys.argv = [str(REPOSITORY / script), *arguments]
        with contextlib.redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        raise AssertionError(f"{command}\n{said.getvalue()[-3000:]}") from stop
    finally:
        sys.argv, sys.path[:] = argv, path


def changed(tree: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of params with other values at some dotted paths."""
    tree = json.loads(json.dumps(tree))
    for path, value in changes.items():
        *parents, last = path.split(".")
        node: Any = tree
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(last) if isinstance(node, list) else last] = value
    return tree


def copy(source: Path, target: Path) -> None:
    """A file or directory, with the directories above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def digest(path: Path) -> str:
    """Of an artifact its manifest's, of another file its own."""
    file = path / "manifest.json" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()


def contents(path: Path) -> dict[str, str]:
    """Digests of the files of an artifact, or of a file. Of a boundary it is its identity."""
    if not path.is_dir():
        return {str(path): digest(path)}
    manifest = json.loads((path / "manifest.json").read_text())
    files = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest["files"]}
    return files or {"key": manifest["facts"]["key"]}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    root = tmp_path_factory.mktemp("parameters")
    with contextlib.chdir(root):
        deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
        pretrained(root)
        own_targets(root)
        yield Pipeline(root)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)


def pretrained(root: Path) -> None:
    """Two models with a tokenizer, one as wide as ours, one not, and their heads apart from their embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz .,", "<unk>", "<eos>"]
    for width in (16, 24):
        torch.manual_seed(width)
        backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer: Any = PreTrainedTokenizerFast
        tokenizer(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(
            root / f"model-{width}"
        )
        config = LlamaConfig(
            vocab_size=len(letters), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(root / f"model-{width}")


def own_targets(root: Path) -> None:
    """Documents with labels of their own: the successor of each id, and none at every third."""
    generator = torch.Generator().manual_seed(0)
    with (root / "labelled.jsonl").open("w") as file:
        for _ in range(24):
            ids = torch.randint(0, 200, (40,), generator=generator).tolist()
            labels = [-100 if i % 3 == 0 else (x + 1) % 200 for i, x in enumerate(ids)]
            file.write(json.dumps({"ids": ids, "labels": labels}) + "\n")


# --- the cases


@dataclass(frozen=True)
class Case:
    """A change of one parameter, and what it must change."""

    name: str
    change: Changes
    first: str
    """The stage whose result it changes first; all that use it, directly or not, must change too, and nothing else."""
    base: Changes = field(default_factory=dict)
    """What else is set, before and after."""
    spared: tuple[str, ...] = ()
    """Stages that come after the first and are the same in spite of it."""


def cases() -> Iterator[Case]:
    """All of them."""
    stack_0, stack_1 = "train_stack_0", "train_stack_1"
    a, m, t, o = "model.attention", "model.mlp", "model.time", "objective"
    mla: Changes = {f"{a}.type": "mla", f"{a}.mla_rkv": 8}
    kernel: Changes = {f"{a}.type": "kernel"}
    mlgka: Changes = {f"{a}.type": "mlgka", f"{a}.mla_rkv": 8, f"{a}.n_kv_heads": 1}

    def of(key: str, value: object, first: str = stack_0, *, base: Changes | None = None, spared: str = "") -> Case:
        return Case(f"{key}={value}", {key: value}, first, base or {}, tuple(spared.split()))

    # attention
    yield Case("standard->gqa", {f"{a}.type": "gqa", f"{a}.n_kv_heads": 1}, stack_0)
    yield Case("standard->mla", mla, stack_0)
    yield Case("standard->kernel", kernel, stack_0)
    yield Case("standard->mlgka", mlgka, stack_0)
    yield of(f"{a}.n_heads", 4)
    yield of(f"{a}.head_dim", 4)
    yield of(f"{a}.qk_norm", True)
    yield of(f"{a}.dropout", 0.5)
    yield of(f"{a}.rope_theta", 100.0)
    for scaling in ("linear", "yarn", "llama3"):
        more = {} if scaling == "linear" else {f"{a}.rope_original_len": 8}
        yield Case(f"rope_scaling={scaling}", {f"{a}.rope_scaling": scaling, f"{a}.rope_factor": 4.0, **more}, stack_0)
    scaled = {f"{a}.rope_scaling": "yarn", f"{a}.rope_factor": 4.0, f"{a}.rope_original_len": 8}
    yield of(f"{a}.rope_factor", 8.0, base=scaled)
    yield of(f"{a}.rope_original_len", 64, base=scaled)
    yield of(f"{a}.mla_rq", 6, base=mla)
    yield of(f"{a}.mla_rkv", 6, base=mla)
    yield of(f"{a}.mla_rope_dim", 2, base=mla)
    yield of(f"{a}.mla_nope_dim", 6, base=mla)
    yield of(f"{a}.mla_v_dim", 6, base=mla)
    for family in ("gaussian", "laplacian", "linear", "uniform"):
        yield of(f"{a}.kernel", family, base=kernel)
    yield of(f"{a}.features", 8, base=kernel)
    yield of(f"{a}.bandwidth", 2.0, base={**kernel, f"{a}.kernel": "gaussian"})
    yield of(f"{a}.redraw", 2, base=kernel)
    yield of(f"{a}.n_kv_heads", 1, base=kernel)
    yield of(f"{a}.mla_rq", 6, base=mlgka)
    yield of(f"{a}.kernel", "gaussian", base=mlgka)
    # single stacks
    yield of("stacks.1.attention", {"type": "kernel"}, stack_1)
    yield of("stacks.1.attention", {"n_heads": 1}, stack_1)
    yield of("stacks.1.mlp", {"hidden": 16}, stack_1)
    yield of("stacks.1.mlp", {"type": "moe"}, stack_1)
    # feed-forward
    yield of(f"{m}.frozen_up", True)
    moe: Changes = {f"{m}.type": "moe"}
    yield of(f"{m}.type", "moe")
    yield of(f"{m}.n_experts", 3, base=moe)
    yield of(f"{m}.top_k", 1, base=moe)
    yield of(f"{m}.n_shared", 1, base=moe)
    yield of(f"{m}.balance_weight", 0.5, base=moe)
    yield of(f"{m}.frozen_up", True, base=moe)
    # embeddings
    own: Changes = {"tokenizer": {"type": "pretrained", "vocab_size": None, "name": "model-16"}}
    yield of("model.tie_embeddings", True)
    yield of("model.embeddings.source", "model-16", base=own)
    yield of("model.embeddings.tensor", "lm_head", base={**own, "model.embeddings.source": "model-16"})
    yield of("model.embeddings.train", False, base={**own, "model.embeddings.source": "model-16"})
    yield of("model.head.source", "model-16", base=own)
    yield of("model.head.tensor", "lm_head", base={**own, "model.head.source": "model-16"})
    yield of("model.head.train", False, base={**own, "model.head.source": "model-16"})
    wide = {"tokenizer": {"type": "pretrained", "vocab_size": None}}
    for place in ("embeddings", "head"):
        adapted = {**wide, f"model.{place}.source": "model-24", f"model.{place}.adapter_hidden": 8}
        yield of(f"model.{place}.adapter_hidden", 12, base=adapted)
    # time
    timed: Changes = {f"{t}.mode": "input"}
    yield of(f"{t}.mode", "input")
    yield of(f"{t}.embedding", "learned", base={**timed, f"{t}.bins": 4})
    yield of(f"{t}.bins", 4, base=timed)
    yield of(f"{t}.width", 8, base=timed)
    yield of(f"{t}.sampling", "batch")
    yield of(f"{t}.mode", "depth")
    yield of(f"{t}.mapping", "exponential", "cache_activations_1", base={f"{t}.mode": "depth", "n_stacks": 3})
    custom = {f"{t}.mapping": "custom", f"{t}.time_per_stack": [0.9, 0.4]}
    yield Case("time_per_stack", custom, "cache_activations_1", base={f"{t}.mode": "depth"})
    # masks
    yield of(f"{o}.mask_min", 0.5)
    yield of(f"{o}.mask_max", 0.5)
    yield of(f"{o}.distribution", "cosine")
    yield of(f"{o}.count", "exact")
    yield of(f"{o}.weighting", "nelbo")
    yield of(f"{o}.variants", 1)
    for schedule in ("constant", "linear", "exponential", "cosine"):
        for over in ("depth", "training"):
            yield Case(f"{schedule} over {over}", {f"{o}.schedule": schedule, f"{o}.schedule_over": over}, stack_0)
    over_depth = {f"{o}.schedule": "linear", f"{o}.schedule_over": "depth"}
    yield of(f"{o}.schedule_stacks", 3, "cache_activations_1", base=over_depth)
    yield of(f"{o}.num_time_steps", 4)
    yield of(f"{o}.time_step_fractions", [0.2, 0.4, 0.6, 0.8], base={f"{o}.num_time_steps": 4})
    yield of(f"{o}.time_step_fractions", {"0": 0.2, "3": 0.5}, base={f"{o}.num_time_steps": 4})
    # of a few samples, which training sees more often than there are variants
    few = {"seq_len": 128, f"{o}.variants": 1, "stack.steps": 16, "stack.batch_size": 16}
    yield of(f"{o}.masks", "fixed", base=few)
    yield Case(f"{o}.masks=pool", {f"{o}.masks": "pool", f"{o}.pool_size": 3}, stack_0)
    yield of(f"{o}.pool_size", 3, base={f"{o}.masks": "pool", f"{o}.pool_size": 2})
    yield of(f"{o}.unit", "word")
    yield of(f"{o}.unit", "word", base={f"{o}.count": "exact"})
    # objectives
    yield of(o, {"type": "clm"})
    yield of(f"{o}.type", "mlm", base={f"{o}.mask_max": 0.5})
    yield of(f"{o}.random_share", 0.1, base={f"{o}.type": "mlm"})
    yield of(f"{o}.keep_share", 0.1, base={f"{o}.type": "mlm"})
    yield of(f"{o}.embedding_weight", 0.5)
    labelled: Changes = {
        "data": {"source": "files", "files": ["labelled.jsonl"], "ids_column": "ids", "labels_column": "labels"},
        o: {"type": "custom"},
        "fine_tune": {},
    }
    yield Case("custom", labelled, "corpus")
    yield of(f"{o}.causal", True, base=labelled)
    yield of("fine_tune.mlm.mask_rate", 0.5, "fine_tune_mlm")
    yield of("fine_tune.mlm.random_share", 0.5, "fine_tune_mlm")
    yield of("fine_tune.mlm.keep_share", 0.5, "fine_tune_mlm")
    yield of("model.document_mask", True, base={"seq_len": 256})


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_parameter(case: Case, pipeline: Pipeline, record_property: Callable[[str, object], None]) -> None:
    before = pipeline.run(case.base)
    after = pipeline.run({**case.base, **case.change})
    different = {name for name in after if after[name] != before.get(name)}
    expected = downstream(case.first) - set(case.spared)
    assert different == expected
    record_property(COVERED, f"{case.name:<60} {len(different):>2} of {len(after)} stages, from {case.first}")


def downstream(first: str) -> set[str]:
    """A stage and all that use what it makes, directly or not."""
    stages = [stage for stage in table(load("params.yaml")) if stage.name != "report"]
    found: set[str] = {first}
    made: set[str] = set()
    for stage in stages:
        if stage.name == first or made & set(stage.inputs):
            found.add(stage.name)
            made |= {*stage.outputs, *stage.metrics, *stage.plots}
    return found
