"""The one table of stages. `dvc.yaml` is rendered from it, and the Snakefile builds its rules from it.

    python -m workflow.stages            write dvc.yaml (after a change of n_stacks, stacks or the fine-tuning branches)
    python -m workflow.stages --check    exit with 1 if dvc.yaml is not what params.yaml asks for

Light on purpose: it imports neither torch nor anything else that is slow.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from stackwise import variants
from stackwise.config.params import Params, load
from stackwise.config.training import FineTuneParams
from stackwise.data.sources import find_files
from stackwise.errors import UserError
from stackwise.growth.pretrained import find_matrices
from workflow.resources import Estimate

RECEIPTS = Path(".stackwise/receipts")
RENDER = "python -m workflow.stages"

# The sources that a stage uses, by room. tests/unit/test_sources.py holds them against what each script imports.
ARTIFACTS = ("stackwise/artifacts/manifest.py", "stackwise/errors.py")
CORPUS = (*ARTIFACTS, "stackwise/config/data.py", "stackwise/data/corpus.py")
TOKENS = (*ARTIFACTS, "stackwise/data/tokens.py")
DEVICE = ("stackwise/config/compute.py", "stackwise/training/device.py")
MODEL = (*ARTIFACTS, "stackwise/config/model.py", "stackwise/model")
OBJECTIVES = ("stackwise/config/objective.py", "stackwise/data/order.py", "stackwise/objectives")
PRETRAINING = "stackwise/growth/pretraining.py"
OF_STACKS = (PRETRAINING, "stackwise/growth/stack_objectives.py")
STACKS = (
    *MODEL,
    *OBJECTIVES,
    "stackwise/config/training.py",
    *(f"stackwise/growth/{name}.py" for name in ("init", "pretrained", "stacks", "window")),
)
RACKS = (*MODEL, "stackwise/growth/racks.py")
TRUNK = (*STACKS, "stackwise/precision")
BOUNDARIES = (
    *(*TRUNK, *TOKENS, *DEVICE, *OF_STACKS, "stackwise/artifacts/code.py"),
    *(f"stackwise/cache/{name}.py" for name in ("boundary", "budget", "store")),
)
TRAINING = (
    *(*RACKS, *OBJECTIVES, *TOKENS, *DEVICE, "stackwise/config/training.py", "stackwise/precision/dtypes.py"),
    *(PRETRAINING, "stackwise/growth/batches.py", "stackwise/growth/window.py"),
    *("stackwise/cache/loader.py", "stackwise/training", "workflow/training.py"),
)
EVALUATION = (
    *(*STACKS, *RACKS, *TOKENS, *DEVICE, "stackwise/precision/dtypes.py"),
    *("stackwise/config/evaluation.py", "stackwise/inference/evaluation.py"),
)
SAMPLING = (*RACKS, *TOKENS, *DEVICE, "stackwise/inference/sampling.py")
DETERMINISM = ("compute.device", "compute.deterministic")
"""Parameters that every stage reads that computes with torch."""

NEUTRAL = (
    "stackwise/config/params.py",
    "stackwise/config/section.py",
    "stackwise/variants.py",
    "stackwise/tracking",
    "workflow/resources.py",
    "workflow/stage.py",
    "workflow/stages.py",
)
"""What carries parameters in and news out and shapes no artifact: an edit of it invalidates nothing."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job of the pipeline."""

    name: str
    """Of the DVC stage and of the Snakemake rule."""
    script: str
    """Its script in workflow/scripts, without the suffix."""
    arguments: dict[str, object] = field(default_factory=dict)
    """Of the script; a list becomes several words."""
    inputs: tuple[str, ...] = ()
    """Artifacts and metrics that it reads."""
    outputs: tuple[str, ...] = ()
    """Artifacts that it makes: directories with a manifest, kept by DVC."""
    metrics: tuple[str, ...] = ()
    """Small JSON files that it makes, kept in git."""
    plots: tuple[str, ...] = ()
    """Likewise: lists of points, for `dvc plots`."""
    params: tuple[str, ...] = ()
    """The keys of params.yaml that it may read; ALL is the whole file."""
    defaulted: frozenset[str] = frozenset()
    """Those of `params` that do not stand in params.yaml: DVC knows no defaults."""
    sources: tuple[str, ...] = ()
    """The sources whose change invalidates it, besides its script."""
    threads: int = 1
    resources: dict[str, int] = field(default_factory=dict)
    """For Snakemake: mem_mb, disk_mb, gpu."""

    @property
    def path(self) -> str:
        """Of its script."""
        return f"workflow/scripts/{self.script}.py"

    @property
    def command(self) -> str:
        """What DVC runs. It names the keys that are absent, or DVC would not notice that one has been taken away."""
        arguments = self.arguments | ({"defaults": sorted(self.defaulted)} if self.defaulted else {})
        return " ".join(("python", self.path, *(f"--{flag} {_words(value)}" for flag, value in arguments.items())))

    @property
    def dependencies(self) -> list[str]:
        """All that DVC watches besides parameters."""
        sources = sorted(set(self.sources))
        return [*self.inputs, self.path, *(s for s in sources if not any(s.startswith(f"{d}/") for d in sources))]

    @property
    def receipt(self) -> str:
        """The empty file that tells Snakemake that DVC finds this stage current."""
        return str(RECEIPTS / self.name)


ALL = "*"


def table(params: Params) -> list[Stage]:
    """All stages, in topological order. The check of the parameters stands first, so that DVC runs it first."""
    stages = [
        Stage(
            name="check_params",
            script="check_params",
            params=(ALL,),
            inputs=_matrices(params),
            sources=("stackwise/config", "stackwise/errors.py", "stackwise/growth/pretrained.py"),
        ),
        *_data_stages(params),
        *_stack_stages(params),
        *_model_stages(params),
    ]
    return [replace(s, defaulted=frozenset(k for k in s.params if _is_default(params, k))) for s in stages]


def _is_default(params: Params, key: str) -> bool:
    """Whether `key` does not stand in the file."""
    node: Any = params
    for name in key.split(".") if key != ALL else ():
        if isinstance(node, list):
            if int(name) >= len(node):
                return True
            node = node[int(name)]
        elif name not in node.model_fields_set:
            return True
        else:
            node = getattr(node, name)
    return False


def _matrices(params: Params) -> tuple[str, ...]:
    """The files on this disk that hold matrices of other models."""
    return tuple(sorted({str(matrix.file) for matrix in find_matrices(params.model, download=False)}))


def _tokenizer_files(directory: Path) -> list[str]:
    """The files of a directory that a tokenizer may read: all but the weights of a model that lies there too."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5")
    return sorted(str(f) for f in directory.iterdir() if f.is_file() and f.suffix not in weights)


def _data_stages(params: Params) -> Iterator[Stage]:
    # What lies on this disk is watched by DVC; what another machine or the running Python holds is not.
    files = find_files(params.data.files)
    along = params.tokenizer.takes_along
    model = params.model
    tokenizer = model.embeddings.source or model.head.source if along else params.tokenizer.name
    local = _tokenizer_files(Path(tokenizer)) if tokenizer is not None and Path(tokenizer).is_dir() else []
    yield Stage(
        name="corpus",
        script="corpus",
        arguments={"out": "artifacts/corpus"},
        inputs=tuple(map(str, files)),
        outputs=("artifacts/corpus",),
        params=("seed", "data"),
        sources=(*CORPUS, "stackwise/data/sources.py"),
        resources={"mem_mb": 1000},
    )
    yield Stage(
        name="tokenize",
        script="tokenize_corpus",
        arguments={"corpus": "artifacts/corpus", "out": "artifacts/tokens"},
        inputs=("artifacts/corpus", *local),
        outputs=("artifacts/tokens",),
        params=("tokenizer", *(("model.embeddings.source", "model.head.source") if along else ())),
        sources=(*CORPUS, *TOKENS, "stackwise/data/encoding.py", "stackwise/data/tokenizer.py"),
        resources={"mem_mb": 2000},
    )


def _stack_stages(params: Params) -> Iterator[Stage]:
    """Append growth: train stack k, quantize it as trunk, cache what it makes of the data, train stack k + 1."""
    estimate, threads, tokens = Estimate(params), params.compute.threads, "artifacts/tokens"
    for k in range(params.n_stacks):
        trunk = [f"artifacts/trunk/{i}" for i in range(k)]
        if k:
            below, boundary, made = f"artifacts/stacks/{k - 1}", f"artifacts/activations/{k}", trunk[-1]
            yield Stage(
                name=f"quantize_trunk_{k - 1}",
                script="quantize_trunk",
                arguments={"stack": below, "out": made},
                inputs=(below,),
                outputs=(made,),
                params=("trunk.dtype",),
                sources=(*TRUNK, *_variants(params, k - 1)),
                resources={"mem_mb": estimate.reading_mb([k - 1])},
            )
            yield Stage(
                name=f"cache_activations_{k}",
                script="cache_activations",
                arguments={"index": k, "tokens": tokens, "trunk": trunk, "out": boundary},
                inputs=(tokens, *trunk),
                outputs=(boundary,),
                params=(
                    *("seed", "seq_len", "objective", "trunk.activations", *_mask_rate_keys(params, k)),
                    *(*DETERMINISM, "compute.dtype", "compute.threads"),
                ),
                sources=(*BOUNDARIES, *_variants(params, *range(k))),
                threads=threads,
                resources={
                    "mem_mb": estimate.reading_mb([k - 1]),
                    "disk_mb": round(1000 * params.activations.budget_gb),
                    "gpu": estimate.gpu(),
                },
            )
        arguments: dict[str, object] = {"index": k, "tokens": tokens}
        inputs = [tokens, *(() if k else _matrices(params))]
        if k:
            arguments |= {"below": below, "trunk": trunk, "activations": boundary}
            inputs += [below, *trunk, boundary]
            if (params.model.tie_embeddings or params.objective.embedding_weight) and k > 1:
                arguments["first"] = "artifacts/stacks/0"
                inputs.append("artifacts/stacks/0")
        out, losses, stack = f"artifacts/stacks/{k}", f"metrics/loss/stack_{k}.json", params.stack_params(k)
        yield Stage(
            name=f"train_stack_{k}",
            script="train_stack",
            arguments={**arguments, "out": out, "losses": losses},
            inputs=tuple(inputs),
            outputs=(out,),
            plots=(losses,),
            params=(
                *("seed", "seq_len", "model", "objective", "stack", "optimizer"),
                *(*DETERMINISM, "compute.dtype", "compute.threads", "compute.compile"),
                f"stacks.{k}",
                *(("trunk.activations",) if k else ()),
                *(key for key in _mask_rate_keys(params, k) if key == "n_stacks"),
            ),
            sources=(*BOUNDARIES, *TRAINING, "stackwise/cache/batches.py", *_variants(params, *range(k + 1))),
            threads=threads,
            resources={"mem_mb": estimate.training_mb([k], stack.batch_size), "gpu": estimate.gpu()},
        )
        stacks = [f"artifacts/stacks/{i}" for i in range(k + 1)]
        yield _evaluation(params, f"stack_{k}", {"stacks": stacks}, stacks, range(k + 1))


def _mask_rate_keys(params: Params, k: int) -> tuple[str, ...]:
    """The keys, besides those of the objective, that the mask rates of stack `k` depend on."""
    time, objective = params.model.time, params.objective
    keys: tuple[str, ...] = ()
    if objective.schedule_stacks is None and (
        objective.by_depth or (time.mode == "depth" and time.mapping != "custom")
    ):
        keys = ("n_stacks",)
    if objective.by_training or time.sampling == "batch":
        keys = (*keys, "stack.batch_size", f"stacks.{k}")
    return (*keys, "stack.steps") if objective.by_training else keys


def _model_stages(params: Params) -> Iterator[Stage]:
    """The fused rack and what is made of it."""
    estimate, tokens, model = Estimate(params), "artifacts/tokens", "artifacts/fused"
    everything = range(params.n_stacks)
    stacks = tuple(f"artifacts/stacks/{k}" for k in everything)
    architectures = _variants(params, *everything)
    yield Stage(
        name="fuse",
        script="fuse",
        arguments={"stacks": stacks, "tokens": tokens, "out": model},
        inputs=(*stacks, tokens),
        outputs=(model,),
        sources=(*STACKS, *RACKS, *TOKENS, *architectures),
        resources={"mem_mb": estimate.reading_mb(everything)},
    )

    def tuning(
        name: str, script: str, base: str, out: str, batch_size: int, threads: str, *keys: str, **flags: str
    ) -> Stage:
        losses = f"metrics/loss/{name.removeprefix('fine_tune_')}.json"
        return Stage(
            name=name,
            script=script,
            arguments={**flags, "model": base, "tokens": tokens, "out": out, "losses": losses},
            inputs=(base, tokens),
            outputs=(out,),
            plots=(losses,),
            params=(
                *("seed", "seq_len", "optimizer"),
                *(*DETERMINISM, "compute.dtype", f"compute.{threads}", "compute.compile"),
                *keys,
            ),
            sources=(*TRAINING, *architectures),
            threads=getattr(params.compute, threads),
            resources={"mem_mb": estimate.training_mb(everything, batch_size), "gpu": estimate.gpu()},
        )

    if params.joint.share:
        joint = "artifacts/joint"
        yield tuning(
            "tune_jointly", "tune_jointly", model, joint, params.joint.batch_size, "threads", "objective", "joint"
        )
        model = joint
    models = {"fused": model}
    for branch in FineTuneParams.model_fields:
        if (settings := getattr(params.fine_tune, branch)) is not None:
            out = f"artifacts/finetuned/{branch}"
            keys = (f"fine_tune.{branch}", *(("objective",) if branch == "diffusion" else ()))
            size = settings.batch_size
            yield tuning(
                f"fine_tune_{branch}", "fine_tune", model, out, size, "branch_threads", *keys, objective=branch
            )
            models[branch] = out
    for name, path in models.items():
        yield _evaluation(params, name, {"model": path}, [path], everything)
    depths = tuple(f"metrics/stack_{k}.json" for k in everything)
    metrics = tuple(f"metrics/{name}.json" for name in models)
    losses = tuple(f"metrics/loss/{name}.json" for name in (*(f"stack_{k}" for k in everything), *list(models)[1:]))
    yield Stage(
        name="report",
        script="report",
        arguments={
            "tokens": tokens,
            "models": list(models.values()),
            "depths": depths,
            "metrics": metrics,
            "losses": losses,
            "depth": "metrics/depth.json",
            "out": "artifacts/report",
        },
        inputs=(tokens, *models.values(), *depths, *metrics, *losses),
        outputs=("artifacts/report",),
        plots=("metrics/depth.json",),
        params=("seed", "seq_len", "report", *DETERMINISM, "compute.branch_threads"),
        sources=(*SAMPLING, *architectures, "workflow/figures.py"),
        threads=params.compute.branch_threads,
        resources={"mem_mb": estimate.reading_mb(everything), "gpu": estimate.gpu()},
    )


def _evaluation(params: Params, name: str, model: dict[str, object], inputs: list[str], stacks: range) -> Stage:
    estimate, out = Estimate(params), f"metrics/{name}.json"
    # A fine-tuned model is measured on what it has learned, which its name says.
    objective = () if name in FineTuneParams.model_fields else ("objective.type", "objective.causal")
    return Stage(
        name=f"evaluate_{name}",
        script="evaluate",
        arguments={"name": name, **model, "tokens": "artifacts/tokens", "out": out},
        inputs=(*inputs, "artifacts/tokens"),
        metrics=(out,),
        params=("seed", "seq_len", "evaluate", *objective, *DETERMINISM, "compute.dtype", "compute.branch_threads"),
        sources=(*EVALUATION, *_variants(params, *stacks)),
        threads=params.compute.branch_threads,
        resources={"mem_mb": estimate.reading_mb(stacks), "gpu": estimate.gpu()},
    )


def _variants(params: Params, *stacks: int) -> tuple[str, ...]:
    """The sources of the architectures of some stacks."""
    return variants.sources(params.stack_model(k) for k in stacks)


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def dvc_yaml(stages: list[Stage]) -> str:
    """The text of dvc.yaml."""
    body: dict[str, dict[str, object]] = {}
    for stage in stages:
        entry: dict[str, object] = {"cmd": stage.command, "deps": stage.dependencies}
        if keys := [key for key in stage.params if key not in stage.defaulted]:
            # All parameters of the file, compared by value, is a file name without keys.
            entry["params"] = [{"params.yaml": None}] if ALL in stage.params else keys
        if stage.outputs:
            entry["outs"] = list(stage.outputs)
        if stage.metrics:
            entry["metrics"] = [{m: {"cache": False}} for m in stage.metrics]
        if stage.plots:
            x = "stack" if stage.name == "report" else "step"
            entry["plots"] = [{p: {"cache": False, "x": x}} for p in stage.plots]
        body[stage.name] = entry
    text = yaml.safe_dump({"stages": body}, sort_keys=False, width=120)
    return f"# Rendered from the table in workflow/stages.py and params.yaml by `{RENDER}`. Do not edit.\n{text}"


def render(stages: list[Stage], path: Path = Path("dvc.yaml")) -> bool:
    """Write dvc.yaml unless it is current; says whether it was not."""
    text = dvc_yaml(stages)
    if path.exists() and path.read_text() == text:
        return False
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
    return True


def check_rendered(params: Params, path: Path = Path("dvc.yaml")) -> list[Stage]:
    """The stages of `params`, if dvc.yaml says the same.

    Raises:
        UserError: it does not.
    """
    stages = table(params)
    if not path.exists() or path.read_text() != dvc_yaml(stages):
        raise UserError(
            f"{path}: out of date with params.yaml, which asks for other stages; run `{RENDER}`, then again"
        )
    return stages


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["--check"]):
        print(__doc__)
        sys.exit(arguments not in (["--help"], ["-h"]))
    try:
        params = load()
        if arguments:
            check_rendered(params)
            print("dvc.yaml is current")
        else:
            print("dvc.yaml written" if render(table(params)) else "dvc.yaml is current")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
