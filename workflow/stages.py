"""The one table of stages. `dvc.yaml` is rendered from it, and the Snakefile builds its rules from it.

    python -m workflow.stages            write dvc.yaml (after a change of n_stacks, stacks or the fine-tuning branches)
    python -m workflow.stages --check    exit with 1 if dvc.yaml is not what params.yaml asks for

Light on purpose: it imports neither torch nor anything else that is slow.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from stackwise import variants
from stackwise.config.generation import CAUSAL_ONLY, UNMASKING_ONLY, SamplesParams
from stackwise.config.growth import LoRAParams
from stackwise.config.params import Params, load
from stackwise.config.training import StackParams
from stackwise.config.tuning import FineTuneParams
from stackwise.data.sources import find_files
from stackwise.errors import UserError
from stackwise.growth.needs import Needs, made_from, needs_of
from stackwise.growth.phases import KEPT, Phase, Version, phases
from stackwise.growth.pretrained import find_matrices
from stackwise.huggingface.checkpoint import files_to_watch

RECEIPTS = Path(".stackwise/receipts")
RENDER = "python -m workflow.stages"
DEPTH_CURVE, BOUNDARY_CURVES = "metrics/depth.json", "metrics/boundaries.json"
SUMMARY = "metrics/summary.json"

# The sources that a stage uses, by room. tests/unit/test_sources.py holds them against what each script imports.
ARTIFACTS = ("stackwise/artifacts/manifest.py", "stackwise/errors.py")
CORPUS = (*ARTIFACTS, "stackwise/config/data.py", "stackwise/data/corpus.py")
TOKENS = (*ARTIFACTS, "stackwise/data/tokens.py")
DEVICE = ("stackwise/config/compute.py", "stackwise/training/device.py")
MODEL = (*ARTIFACTS, "stackwise/config/model.py", "stackwise/model")
TASKS = (
    *("stackwise/config/objective.py", "stackwise/data/order.py"),
    *(f"stackwise/objectives/{name}.py" for name in ("corruption", "draws", "fixed", "masks", "schedules")),
    *(f"stackwise/objectives/{name}.py" for name in ("targets", "words")),
)
"""What a model sees and must make of it: the objectives without their losses."""
OBJECTIVES = (*TASKS, "stackwise/objectives/loss.py")
HELD_OUT = "stackwise/objectives/held_out.py"
PRETRAINING = "stackwise/growth/pretraining.py"
DEPTH = (
    *("stackwise/growth/depth.py", "stackwise/objectives/schedules.py"),
    *("stackwise/config/objective.py", "stackwise/data/order.py"),
)
OF_STACKS = (*DEPTH, PRETRAINING, "stackwise/growth/stack_objectives.py")
STACKS = (*MODEL, "stackwise/config/growth.py", "stackwise/growth/stacks.py")
TRUNK = (*STACKS, "stackwise/config/compute.py", "stackwise/precision")
GROUND = (*TRUNK, "stackwise/growth/trunk.py")
RACKS = (*MODEL, "stackwise/growth/racks.py")
FUSING = (*GROUND, *RACKS, "stackwise/growth/fusing.py")
BOUNDARIES = (
    *(*GROUND, *TOKENS, *DEVICE, *TASKS, *OF_STACKS, "stackwise/artifacts/code.py"),
    *(f"stackwise/cache/{name}.py" for name in ("boundary", "budget", "narrow", "sizes", "store", "variants")),
)
TRAINING = (
    *(*RACKS, *OBJECTIVES, *TOKENS, *DEVICE, "stackwise/config/training.py", "stackwise/precision/dtypes.py"),
    *(PRETRAINING, *(f"stackwise/growth/{name}.py" for name in ("batches", "tuning", "window"))),
    *("stackwise/cache/loader.py", "stackwise/training", "workflow/training.py"),
)
WINDOWS = (
    *(f"stackwise/growth/{name}.py" for name in ("assembly", "init", "phases", "pretrained", "training", "validation")),
    *(HELD_OUT, "stackwise/cache/batches.py", "stackwise/cache/streaming.py"),
)
PREPARING = (
    *(*CORPUS, *TOKENS, "stackwise/config/tuning.py", "stackwise/config/growth.py"),
    *(f"stackwise/data/{name}.py" for name in ("encoding", "examples", "sources", "tokenizer")),
)
BRANCHES = (
    *(*TRAINING, "stackwise/config/tuning.py", "stackwise/config/growth.py", HELD_OUT),
    *("stackwise/growth/validation.py", "stackwise/finetuning/branch.py"),
)
FINE_TUNING = (*BRANCHES, *(f"stackwise/finetuning/{name}.py" for name in ("objectives", "training")))
CLASSIFIER = ("stackwise/finetuning/classifier.py", "stackwise/growth/window.py")
CLASSIFYING = (*BRANCHES, *CLASSIFIER, "stackwise/finetuning/classification.py")
EVALUATION = (
    *(*FUSING, *TOKENS, *DEVICE, *OBJECTIVES, HELD_OUT, "stackwise/config/evaluation.py"),
    *(f"stackwise/inference/{name}.py" for name in ("completions", "depth", "evaluation", "intervals")),
)
EVALUATING_CLASSIFIERS = (
    *(*RACKS, *TOKENS, *DEVICE, *OBJECTIVES, *CLASSIFIER, "stackwise/config/evaluation.py"),
    *(f"stackwise/inference/{name}.py" for name in ("classification", "intervals")),
    "stackwise/precision/dtypes.py",
)
SCORING = (
    *(*RACKS, *TOKENS, *DEVICE, *OBJECTIVES, "stackwise/data/choices.py", "stackwise/precision/dtypes.py"),
    *(f"stackwise/inference/{name}.py" for name in ("choices", "intervals", "scoring")),
    *("stackwise/config/data.py", "stackwise/data/tokenizer.py"),
)
SCORING_SAMPLES = (
    *(*RACKS, *TOKENS, *DEVICE, *OBJECTIVES, HELD_OUT, "stackwise/config/data.py", "stackwise/data/tokenizer.py"),
    *("stackwise/generation/prompts.py", "stackwise/precision/dtypes.py"),
    *(f"stackwise/inference/{name}.py" for name in ("intervals", "samples", "scoring")),
)
ANALYSIS = (
    *(
        *RACKS,
        *TOKENS,
        *DEVICE,
        *OBJECTIVES,
        HELD_OUT,
        "stackwise/precision/dtypes.py",
        "stackwise/config/evaluation.py",
    ),
    *(f"stackwise/inference/{name}.py" for name in ("depth", "evaluation", "intervals")),
    *("stackwise/analysis", "workflow/figures.py", "workflow/inside.py"),
)
SAMPLING = (
    *(*RACKS, *DEVICE, "stackwise/config/generation.py", "stackwise/generation", "stackwise/objectives/draws.py"),
    *("stackwise/config/data.py", "stackwise/data/tokenizer.py", "stackwise/data/tokens.py"),
)
WEIGHTS_OF_OTHERS = ("stackwise/huggingface/native.py", "stackwise/huggingface/tensors.py")
IMPORTING = (
    *(*STACKS, *RACKS, *TOKENS, *WEIGHTS_OF_OTHERS, "stackwise/config/data.py", "stackwise/data/tokenizer.py"),
    *("stackwise/growth/pretrained.py", "stackwise/huggingface/checkpoint.py", "stackwise/huggingface/importing.py"),
)
EXPORTING = (
    *(*RACKS, *WEIGHTS_OF_OTHERS),
    *(f"stackwise/huggingface/{name}.py" for name in ("adapters", "card", "exporting", "shipped", "tokenizer")),
    *(f"stackwise/huggingface/{name}.py" for name in ("configuration", "modeling")),  # which it copies
)
TOKENIZER_SOURCES = ("growth.start", "model.embeddings.source", "model.head.source")
"""Models that a tokenizer may come along with."""
EVALUATED = tuple(f"evaluate.{name}" for name in ("samples", "draws", "batch_size", "mask_rates"))
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

    @property
    def path(self) -> str:
        """Of its script."""
        return f"workflow/scripts/{self.script}.py"

    @property
    def command(self) -> str:
        """What DVC runs. It names the keys that are absent, or DVC would not notice that one has been taken away."""
        arguments = self.arguments | ({"defaults": sorted(self.defaulted)} if self.defaulted else {})
        words = (f"--{flag} {_words(value)}".strip() for flag, value in arguments.items())
        return " ".join(("python", self.path, *words))

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
            inputs=(*_matrices(params), *_start_files(params), *_choices(params)),
            sources=(
                *("stackwise/config", "stackwise/data/choices.py", "stackwise/errors.py"),
                *("stackwise/growth/pretrained.py", "stackwise/huggingface/checkpoint.py"),
            ),
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
        elif isinstance(node, dict):
            node = node[name]
        elif name not in node.model_fields_set:
            return True
        else:
            node = getattr(node, name)
    return False


def _matrices(params: Params) -> tuple[str, ...]:
    """The files on this disk that hold matrices of other models."""
    return tuple(sorted({str(matrix.file) for matrix in find_matrices(params.model, download=False)}))


def _start_files(params: Params) -> tuple[str, ...]:
    """The files on this disk that hold the model that growth starts with."""
    start = params.growth.start
    return () if start is None else tuple(files_to_watch(start))


def _choices(params: Params) -> tuple[str, ...]:
    """The files of multiple-choice questions."""
    return tuple(own.file for own in params.evaluate.choices)


def _tokenizer_files(directory: Path) -> list[str]:
    """The files of a directory that a tokenizer may read: all but the weights of a model that lies there too."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5")
    return sorted(str(f) for f in directory.iterdir() if f.is_file() and f.suffix not in weights)


def _data_stages(params: Params) -> Iterator[Stage]:
    # What lies on this disk is watched by DVC; what another machine or the running Python holds is not.
    files = find_files(params.data.files)
    along = params.tokenizer.takes_along
    model = params.model
    comes_with = params.growth.start or model.embeddings.source or model.head.source
    tokenizer = comes_with if along else params.tokenizer.name
    local = _tokenizer_files(Path(tokenizer)) if tokenizer is not None and Path(tokenizer).is_dir() else []
    yield Stage(
        name="corpus",
        script="corpus",
        arguments={"out": "artifacts/corpus"},
        inputs=tuple(map(str, files)),
        outputs=("artifacts/corpus",),
        params=("seed", "data"),
        sources=(*CORPUS, "stackwise/data/sources.py"),
    )
    yield Stage(
        name="tokenize",
        script="tokenize_corpus",
        arguments={"corpus": "artifacts/corpus", "out": "artifacts/tokens"},
        inputs=("artifacts/corpus", *local),
        outputs=("artifacts/tokens",),
        params=("tokenizer", *(TOKENIZER_SOURCES if along else ())),
        sources=(*CORPUS, *TOKENS, "stackwise/data/encoding.py", "stackwise/data/tokenizer.py"),
    )


def _stack_stages(params: Params) -> Iterator[Stage]:
    """Growth: train what a phase trains, quantize it as trunk, cache what it makes of the data, go on."""
    every = phases(params.growth, params.n_stacks, lora=params.adapters.stack is not None)
    made: set[str] = set()
    for phase in every:
        for version in (*phase.below, *phase.quantized):
            if (trunk := _trunk(every, version)) not in made:
                made.add(trunk)
                yield _quantization(params, every, version)
        if phase.cached:
            yield _caching(params, every, phase)
        yield _importing(params, phase) if phase.imported else _training(params, every, phase)
        if len(phase.kept) == len(phase.order):
            depth = {"depth": phase.number}
            adapters = _adapters(every, *phase.order, versions=phase.kept)
            yield _evaluation(params, phase.name, _assembled(every, phase) | depth, phase.order, adapters)


def _importing(params: Params, phase: Phase) -> Stage:
    """The first stacks, from another model."""
    tokens = "artifacts/tokens"
    overridden = (f"stacks.{k}" for k in range(params.growth.imported))
    return Stage(
        name="import",
        script="import_stacks",
        arguments={"tokens": tokens, "out": phase.path},
        inputs=(tokens, *_start_files(params)),
        outputs=(phase.path,),
        params=("model", "stack.blocks", "growth.start", "growth.start_stacks", *overridden),
        sources=(*IMPORTING, *_variants(params, *range(params.growth.imported))),
    )


def _quantization(params: Params, every: list[Phase], version: Version) -> Stage:
    """A stack as trunk."""
    training, trunk, k = every[version.weights], _trunk(every, version), version.stack
    return Stage(
        name=f"quantize_trunk_{Path(trunk).name}",
        script="quantize_trunk",
        arguments={"index": k, "training": training.path, "out": trunk},
        inputs=(training.path,),
        outputs=(trunk,),
        params=("trunk.precision", f"trunk.precisions.{k}"),
        sources=(*TRUNK, *_adapters(every, k), *_variants(params, k)),
    )


def _caching(params: Params, every: list[Phase], phase: Phase) -> Stage:
    """The boundary that a phase trains on."""
    tokens, below = "artifacts/tokens", [v.stack for v in phase.below]
    needs = needs_of(params, every, phase)
    arguments, inputs = _ground_below(every, phase, needs)
    return Stage(
        name=f"cache_activations_{phase.label}",
        script="cache_activations",
        arguments={"index": phase.stack, "tokens": tokens, **arguments, "out": phase.boundary},
        inputs=(tokens, *inputs),
        outputs=(phase.boundary,),
        params=(
            *("seed", "seq_len", "objective", "growth.masks", "trunk.activations", "trunk.compute"),
            *(*DETERMINISM, "compute.dtype", "compute.threads"),
            *(key for link in needs.links for key in _mask_rate_keys(params, link.stack)),
        ),
        sources=(*BOUNDARIES, *_adapters(every, versions=phase.below), *_variants(params, *below)),
        threads=params.compute.threads,
    )


def _training(params: Params, every: list[Phase], phase: Phase) -> Stage:
    """One training."""
    tokens, k = "artifacts/tokens", phase.stack
    window = [member.stack for member in phase.window]
    needs = needs_of(params, every, phase)
    trainings = _paths(every, needs.trainings)
    quantized = [_trunk(every, version) for version in phase.quantized]
    arguments: dict[str, object] = {
        "index": k,
        **({"sweep": phase.sweep} if phase.sweep else {}),
        "window": [f"{member.stack}={member.role}" for member in phase.window],
        **({"embeddings": "learn"} if phase.embeddings_learn else {}),
        **({"masks": "fresh"} if phase.fresh else {}),
        "tokens": tokens,
    }
    inputs = [tokens, *(() if phase.number else _matrices(params)), *trainings, *quantized]
    keys = ["seed", "seq_len", "model", "objective", "growth.masks", "optimizer", *DETERMINISM]
    by_depth = ("steps_factor", "lr_factor")  # they change nothing of the first stack
    keys += ["stack"] if k else [f"stack.{name}" for name in StackParams.model_fields if name not in by_depth]
    keys += [f"compute.{name}" for name in ("dtype", "threads", "compile", "activation_checkpointing")]
    keys += [f"stacks.{j}" for j in sorted({k, *(m.stack for m in phase.window if m.role in (*KEPT, "initial"))})]
    keys += _mask_rate_keys(params, k)
    if trainings:
        arguments["trainings"] = trainings
    if needs.copies is not None:
        arguments["copies"] = needs.copies
    if quantized:
        arguments["quantized"] = quantized
        keys.append("trunk.compute")
    if phase.below:
        below, more = _ground_below(every, phase, needs)
        arguments |= below
        inputs += more
        keys += ["trunk.compute", "trunk.activations"]
        if phase.cached:
            arguments["activations"] = phase.boundary
            inputs.append(phase.boundary)
            keys += [key for link in needs.links for key in _mask_rate_keys(params, link.stack)]
    roles = {member.role for member in phase.window}
    if roles & {"weights", "adapters"}:
        keys.append("growth.unfreeze")
    if "lora" in roles:
        keys += _adapter_keys(params.adapters.stack, "stack", phase.new)
    if "adapters" in roles:
        # Those that have adapters go on with them as they are.
        keys += _adapter_keys(params.adapters.trunk, "trunk", [v.stack for v in phase.older if v.adapters is None])
    if needs.known is not None:
        arguments["known"] = needs.known
        keys += ["growth.consistency", *_mask_rate_keys(params, needs.known)]
    losses = f"metrics/loss/{phase.name}.json"
    copied = () if needs.copies is None else (needs.copies,)
    adapted = (v for v in phase.kept if v.adapters == phase.number)
    return Stage(
        name=f"train_{phase.name}",
        script="train_stack",
        arguments={**arguments, "out": phase.path, "losses": losses},
        inputs=tuple(dict.fromkeys(inputs)),
        outputs=(phase.path,),
        plots=(losses,),
        params=_distinct(keys),
        sources=(
            *BOUNDARIES,
            *TRAINING,
            *WINDOWS,
            *_adapters(every, *window, *copied, versions=(*phase.below, *adapted)),
            *_variants(params, *window, *(v.stack for v in phase.below)),
        ),
        threads=params.compute.threads,
    )


def _adapter_keys(settings: LoRAParams | None, kind: str, stacks: Iterable[int]) -> list[str]:
    """The keys that a training depends on in which some stacks begin to have adapters of a kind."""
    if settings is None or settings.strategy != "variable":
        return [f"adapters.{kind}"]
    by_stack = ("ranks", "alphas")
    keys = [name for name in LoRAParams.model_fields if name not in by_stack]
    return [f"adapters.{kind}.{key}" for key in (*keys, *(f"{name}.{k}" for name in by_stack for k in stacks))]


def _distinct(keys: Iterable[str]) -> tuple[str, ...]:
    """Each once, and none that lies within another."""
    found = dict.fromkeys(keys)
    return tuple(key for key in found if not any(key.startswith(f"{other}.") for other in found))


def _ground_below(every: list[Phase], phase: Phase, needs: Needs) -> tuple[dict[str, object], list[str]]:
    """The frozen stacks below a window, as arguments of a script and as inputs."""
    trunk, adapted = [_trunk(every, version) for version in phase.below], _paths(every, needs.adapted)
    arguments: dict[str, object] = {"trunk": trunk}
    if adapted:
        arguments["adapted"] = adapted
    if needs.links:
        arguments["chain"] = [f"{len(p.below)}:{p.stack}" + f":{p.sweep}" * bool(p.sweep) for p in needs.links]
    return arguments, [*trunk, *adapted]


def _assembled(every: list[Phase], phase: Phase) -> dict[str, object]:
    """The rack after a phase, as arguments of a script; those that are paths are its inputs."""
    numbers, adapted = made_from(phase)
    arguments: dict[str, object] = {"trainings": _paths(every, numbers), "order": list(phase.order)}
    return arguments | ({"trunk": [_trunk(every, version) for version in adapted]} if adapted else {})


def _paths(every: list[Phase], numbers: Iterable[int]) -> list[str]:
    """The artifacts of some phases."""
    return [every[number].path for number in numbers]


def _trunk(every: list[Phase], version: Version) -> str:
    """The artifact of a quantized stack."""
    sweep = every[version.weights].sweep
    return f"artifacts/trunk/{version.stack}" + f"_sweep_{sweep}" * bool(sweep)


def _mask_rate_keys(params: Params, k: int) -> tuple[str, ...]:
    """The keys, besides those of the objective, that the mask rates of stack `k` depend on."""
    time, objective = params.model.time, params.objective
    keys: tuple[str, ...] = ()
    if objective.by_depth or (time.mode == "depth" and time.mapping != "custom"):
        keys = ("growth.building_mode", *(("n_stacks",) if objective.schedule_stacks is None else ()))
    if objective.by_training or time.sampling == "batch":
        keys = (*keys, "stack.batch_size", f"stacks.{k}")
    if not objective.by_training:
        return keys
    return (*keys, "stack.steps", *(("stack.steps_factor",) if k else ()))


def _model_stages(params: Params) -> Iterator[Stage]:
    """The fused rack and what is made of it."""
    tokens, model = "artifacts/tokens", "artifacts/fused"
    everything = range(params.n_stacks)
    every = phases(params.growth, params.n_stacks, lora=params.adapters.stack is not None)
    rack = _assembled(every, every[-1])
    # A stack that was prepended has learned to read its own share of masks straight from the embeddings.
    unrolls = params.model.time.mode == "depth" and params.growth.building_mode == "prepend"
    architectures = _variants(params, *everything)
    adapters = _adapters(every, *everything, versions=every[-1].kept)
    unmerged = () if params.adapters.merge else adapters
    yield Stage(
        name="fuse",
        script="fuse",
        arguments={**rack, **({"depth-as-time": ""} if unrolls else {}), "tokens": tokens, "out": model},
        inputs=(*_path_arguments(rack), tokens),
        outputs=(model,),
        params=(
            *("adapters.merge", "seq_len"),
            *(
                ("model.time", "objective", *_mask_rate_keys(params, 0))
                if unrolls
                else ("objective.type", "objective.causal")
            ),
        ),
        sources=(*FUSING, *DEPTH, *TOKENS, *adapters, *architectures),
    )

    if params.joint.share:
        joint = "artifacts/joint"
        yield _tuning(
            params, "tune_jointly", "tune_jointly", {"model": model, "tokens": tokens, "out": joint}, "threads"
        )
        model = joint
    racks, classifiers, adapted = {"fused": model}, [], {"fused": unmerged}
    yield _evaluation(params, "fused", {"model": model}, everything, unmerged)
    for name, branch in params.fine_tune.items():
        own = branch.data is not None
        if own:
            yield _preparation(params, name, branch)
        data, out = f"artifacts/prepared/{name}" if own else tokens, f"artifacts/finetuned/{name}"
        yield _fine_tuning(params, name, branch, {"model": model, "tokens": data, "out": out})
        beside = variants.ADAPTERS if branch.adapters is not None and not branch.merge else ()
        if branch.objective == "classification":
            classifiers.append(name)
            yield _classifier_evaluation(params, name, {"model": out, "tokens": data}, beside)
        else:
            racks[name] = out
            arguments: dict[str, object] = {"objective": branch.objective, "model": out}
            yield _evaluation(params, name, arguments | ({"own": data} if own else {}), everything, beside)
        adapted[name] = beside
    samples = []
    for name, path in racks.items():
        learned = params.objective.type if name == "fused" else params.fine_tune[name].objective
        if learned != "custom":  # what it predicts need not be text
            samples.append(f"artifacts/samples/{name}")
            yield _sampling(params, name, path, samples[-1], learned == "clm", (*adapted[name], *architectures))
    for name in params.export.models:
        yield _export(params, name, racks[name], adapted[name])
    choosing: list[str] = []
    for name, path in racks.items() if params.evaluate.choices else ():
        choosing.append(f"metrics/choices/{name}.json")
        yield _choosing(params, name, path, choosing[-1], everything, adapted[name])
    causal = {name: path for name, path in racks.items() if _is_causal(params, name)}
    yield _analysis(params, racks, causal, everything, adapted)
    scored: list[str] = []
    if samples and (scorer := params.evaluate.scorer or next(iter(causal), None)) is not None:
        scored = ["metrics/samples.json"]
        yield _scoring(params, causal[scorer], samples, scored[0], (*adapted[scorer], *architectures))
    measured = [phase.name for phase in every if len(phase.kept) == len(phase.order)]
    depths = tuple(f"metrics/{name}.json" for name in measured)
    metrics = tuple(f"metrics/{name}.json" for name in racks)
    classified = tuple(f"metrics/{name}.json" for name in classifiers)
    trained = (*(phase.name for phase in every if not phase.imported), *list(racks)[1:], *classifiers)
    losses = tuple(f"metrics/loss/{name}.json" for name in trained)
    yield Stage(
        name="report",
        script="report",
        arguments={
            **({"samples": samples} if samples else {}),
            "depths": depths,
            "metrics": metrics,
            "losses": losses,
            **({"classifiers": classified} if classified else {}),
            **({"choices": choosing} if choosing else {}),
            **({"scores": scored} if scored else {}),
            "depth": DEPTH_CURVE,
            "summary": SUMMARY,
            "out": "artifacts/report",
        },
        inputs=(*samples, *depths, *metrics, *losses, *classified, *choosing, *scored),
        outputs=("artifacts/report",),
        metrics=(SUMMARY,),
        plots=(DEPTH_CURVE,),
        sources=(*ARTIFACTS, "workflow/figures.py", "workflow/summary.py"),
    )


def _sampling(params: Params, name: str, model: str, out: str, causal: bool, sources: tuple[str, ...]) -> Stage:
    """Texts of a model."""
    without = UNMASKING_ONLY if causal else CAUSAL_ONLY
    keys = (f"samples.{key}" for key in SamplesParams.model_fields if key not in without)
    return Stage(
        name=f"sample_{name}",
        script="sample",
        arguments={"model": model, "out": out},
        inputs=(model,),
        outputs=(out,),
        params=("seed", *keys, *DETERMINISM, "compute.branch_threads"),
        sources=(*SAMPLING, *sources),
        threads=params.compute.branch_threads,
    )


def _export(params: Params, name: str, model: str, adapters: tuple[str, ...]) -> Stage:
    """A rack for Transformers."""
    metrics, out = f"metrics/{name}.json", f"artifacts/exported/{name}"
    return Stage(
        name=f"export_{name}",
        script="export_rack",
        arguments={"name": name, "model": model, "metrics": metrics, "out": out},
        inputs=(model, metrics),
        outputs=(out,),
        params=("export.dtype",),
        sources=(*EXPORTING, *adapters, *_variants(params, *range(params.n_stacks))),
    )


def _tuning(
    params: Params,
    name: str,
    script: str,
    arguments: dict[str, object],
    threads: str,
    *,
    keys: Iterable[str] = ("objective", "joint"),
    sources: tuple[str, ...] = TRAINING,
) -> Stage:
    """The training of a whole rack, whose `model`, `tokens` and `out` are among the arguments."""
    losses = f"metrics/loss/{name.removeprefix('fine_tune_')}.json"
    every = phases(params.growth, params.n_stacks, lora=params.adapters.stack is not None)
    everything = range(params.n_stacks)
    unmerged = () if params.adapters.merge else _adapters(every, *everything, versions=every[-1].kept)
    return Stage(
        name=name,
        script=script,
        arguments={**arguments, "losses": losses},
        inputs=(str(arguments["model"]), str(arguments["tokens"])),
        outputs=(str(arguments["out"]),),
        plots=(losses,),
        params=(
            *("seed", "seq_len", "optimizer"),
            *(*DETERMINISM, "compute.dtype", f"compute.{threads}", "compute.compile"),
            *("compute.activation_checkpointing", *keys),
        ),
        sources=(*sources, *unmerged, *_variants(params, *everything)),
        threads=getattr(params.compute, threads),
    )


def _preparation(params: Params, name: str, branch: FineTuneParams) -> Stage:
    """Own data as token files."""
    own, key = branch.data, f"fine_tune.{name}.data"
    assert own is not None
    files = [*find_files(own.files, f"{key}.files"), *find_files(own.validation_files, f"{key}.validation_files")]
    tokens, out = "artifacts/tokens", f"artifacts/prepared/{name}"
    return Stage(
        name=f"prepare_{name}",
        script="prepare_data",
        arguments={"branch": name, "tokens": tokens, "out": out},
        inputs=(tokens, *dict.fromkeys(map(str, files))),
        outputs=(out,),
        params=("seed", key, *(("seq_len",) if own.packed else ())),
        sources=PREPARING,
    )


def _fine_tuning(params: Params, name: str, branch: FineTuneParams, arguments: dict[str, object]) -> Stage:
    """A branch. Of its data it knows what `prepare` has made of it."""
    keys = [f"fine_tune.{name}.{key}" for key in FineTuneParams.model_fields if key != "data"]
    if branch.objective == "diffusion":
        keys.append("objective")
    classifies = branch.objective == "classification"
    adapters = variants.TASK_ADAPTERS if branch.adapters is not None else ()
    return _tuning(
        params,
        f"fine_tune_{name}",
        "fine_tune_classifier" if classifies else "fine_tune",
        {"branch": name, **arguments},
        "branch_threads",
        keys=keys,
        sources=(*(CLASSIFYING if classifies else FINE_TUNING), *adapters),
    )


def _path_arguments(arguments: Mapping[str, object]) -> list[str]:
    """The artifacts among the arguments of a script."""
    return [
        path
        for value in arguments.values()
        for path in (value if isinstance(value, list) else [value])
        if isinstance(path, str) and path.startswith("artifacts/")
    ]


def _evaluation(
    params: Params, name: str, model: dict[str, object], stacks: Sequence[int], adapters: tuple[str, ...]
) -> Stage:
    out = f"metrics/{name}.json"
    # A fine-tuned model is measured on what it has learned, which its arguments say.
    objective = () if "objective" in model else ("objective.type", "objective.causal")
    return Stage(
        name=f"evaluate_{name}",
        script="evaluate",
        arguments={"name": name, **model, "tokens": "artifacts/tokens", "out": out},
        inputs=(*_path_arguments(model), "artifacts/tokens"),
        metrics=(out,),
        params=(*("seed", "seq_len"), *EVALUATED, *objective, *DETERMINISM, "compute.dtype", "compute.branch_threads"),
        sources=(*EVALUATION, *adapters, *_variants(params, *stacks)),
        threads=params.compute.branch_threads,
    )


def _choosing(
    params: Params, name: str, model: str, out: str, stacks: Sequence[int], adapters: tuple[str, ...]
) -> Stage:
    """The multiple-choice questions that a model answers."""
    return Stage(
        name=f"answer_choices_{name}",
        script="answer_choices",
        arguments={"name": name, "model": model, "tokens": "artifacts/tokens", "out": out},
        inputs=(model, "artifacts/tokens", *_choices(params)),
        metrics=(out,),
        params=(
            *("seed", "seq_len", "evaluate.choices", "evaluate.batch_size"),
            *(*DETERMINISM, "compute.dtype", "compute.branch_threads"),
        ),
        sources=(*SCORING, *adapters, *_variants(params, *stacks)),
        threads=params.compute.branch_threads,
    )


def _is_causal(params: Params, name: str) -> bool:
    """Whether the positions of a model only look back."""
    own = params.objective
    if name != "fused":
        return params.fine_tune[name].objective == "clm"
    return own.type == "clm" or (own.type == "custom" and own.causal)


def _scoring(params: Params, scorer: str, samples: list[str], out: str, sources: tuple[str, ...]) -> Stage:
    """What a causal model makes of the texts of all."""
    return Stage(
        name="score_samples",
        script="score_samples",
        arguments={"scorer": scorer, "samples": samples, "tokens": "artifacts/tokens", "out": out},
        inputs=(scorer, *samples, "artifacts/tokens"),
        metrics=(out,),
        params=(
            *("seed", "seq_len", "evaluate.batch_size", *DETERMINISM),
            *("compute.dtype", "compute.branch_threads"),
        ),
        sources=(*SCORING_SAMPLES, *sources),
        threads=params.compute.branch_threads,
    )


def _analysis(
    params: Params,
    models: Mapping[str, str],
    causal: Mapping[str, str],
    stacks: Sequence[int],
    adapted: Mapping[str, tuple[str, ...]],
) -> Stage:
    """What is to be seen inside the first bidirectional model and the first causal one."""
    shown = [next((name for name in models if (name in causal) is kind), None) for kind in (False, True)]
    roles = {role: name for role, name in zip(("bidirectional", "causal"), shown, strict=True) if name is not None}
    return Stage(
        name="analyse",
        script="analyse",
        arguments={
            **{role: models[name] for role, name in roles.items()},
            "tokens": "artifacts/tokens",
            **({"labelled": ""} if params.objective.type == "custom" else {}),
            "metrics": "metrics/analysis.json",
            "boundaries": BOUNDARY_CURVES,
            "out": "artifacts/analysis",
        },
        inputs=(*(models[name] for name in roles.values()), "artifacts/tokens"),
        outputs=("artifacts/analysis",),
        metrics=("metrics/analysis.json",),
        plots=(BOUNDARY_CURVES,),
        params=("seed", "seq_len", "analyse", *DETERMINISM, "compute.dtype", "compute.branch_threads"),
        sources=(*ANALYSIS, *(s for name in roles.values() for s in adapted[name]), *_variants(params, *stacks)),
        threads=params.compute.branch_threads,
    )


def _classifier_evaluation(params: Params, name: str, paths: dict[str, object], adapters: tuple[str, ...]) -> Stage:
    out = f"metrics/{name}.json"
    return Stage(
        name=f"evaluate_{name}",
        script="evaluate_classifier",
        arguments={"name": name, **paths, "out": out},
        inputs=tuple(_path_arguments(paths)),
        metrics=(out,),
        params=("seed", "seq_len", "evaluate.batch_size", *DETERMINISM, "compute.dtype", "compute.branch_threads"),
        sources=(*EVALUATING_CLASSIFIERS, *adapters, *_variants(params, *range(params.n_stacks))),
        threads=params.compute.branch_threads,
    )


def _variants(params: Params, *stacks: int) -> tuple[str, ...]:
    """The sources of the architectures of some stacks."""
    return variants.sources(params.stack_model(k) for k in stacks)


def _adapters(every: list[Phase], *stacks: int, versions: Iterable[Version] = ()) -> tuple[str, ...]:
    """The sources of adapters, if any of some stacks has learned a LoRA, or any of `versions` has adapters."""
    loras = {member.stack for phase in every for member in phase.window if member.role == "lora"}
    return variants.ADAPTERS if loras & {*stacks} or any(v.adapters is not None for v in versions) else ()


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
        # Not among `outs`, where a file without a cache keeps DVC from putting the stage back out of its run-cache.
        if stage.metrics:
            entry["metrics"] = [{m: {"cache": False}} for m in stage.metrics]
        if stage.plots:
            entry["plots"] = [{p: {"cache": False, **_axes(p)}} for p in stage.plots]
        body[stage.name] = entry
    text = yaml.dump({"stages": body}, Dumper=yaml.CSafeDumper, sort_keys=False, width=120)
    return f"# Rendered from the table in workflow/stages.py and params.yaml by `{RENDER}`. Do not edit.\n{text}"


def _axes(plot: str) -> dict[str, str]:
    """What `dvc plots` shows of a file of points, and what it calls that."""
    if plot == DEPTH_CURVE:
        x, y = {"x": "training"}, {"y": "bits_per_byte", "y_label": "bound or NLL of held-out text (bits per byte)"}
        return {"title": "Quality after each training of the rack", **x, **y}
    if plot == BOUNDARY_CURVES:
        return {"title": "What is to be seen at each boundary", "x": "boundary"}
    x, y = {"x": "step", "x_label": "optimizer step"}, {"y": "loss", "y_label": "loss (nats per token of the batch)"}
    return {"title": f"Training loss: {Path(plot).stem.replace('_', ' ')}", **x, **y}


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
