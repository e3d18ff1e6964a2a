"""`params.yaml` as a whole: loading, validation with all problems at once, a stage's view."""

import copy
import difflib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import Field, ValidationError

from stackwise.config.allowed import as_yaml, at, dereference, in_words
from stackwise.config.analysis import AnalyseParams
from stackwise.config.compute import ActivationsParams, ComputeParams, TrunkParams
from stackwise.config.data import DataParams, TokenizerParams
from stackwise.config.evaluation import EvaluateParams
from stackwise.config.export import ExportParams
from stackwise.config.generation import SamplesParams
from stackwise.config.growth import AdaptersParams, GrowthParams
from stackwise.config.model import ModelParams
from stackwise.config.objective import MASKED, MASKING, ObjectiveParams
from stackwise.config.section import Section
from stackwise.config.tracking import TrackingParams
from stackwise.config.training import (
    CheckpointParams,
    JointParams,
    OptimizerParams,
    StackOverrides,
    StackParams,
)
from stackwise.config.tuning import FineTuneParams, name_problems
from stackwise.errors import UserError

UNTRACKED = ("activations", "checkpoint", "tracking")
"""Sections that change no result: every stage may read them, none declares them."""

_HARMLESS: dict[str, Any] = {"seed": 0, "seq_len": 2, "n_stacks": 10**9, "stacks": []}
"""Values that hide no problem of others; of all other sections `{}`."""


class Params(Section):
    """All parameters of a pipeline. Every section must stand in the file; keys within a section have defaults."""

    seed: int = Field(ge=0, lt=2**32)
    """Seed of everything that is drawn."""
    seq_len: int = Field(ge=2)
    """Length of a sample (tokens)."""
    data: DataParams
    """Where the text comes from and how it is cleaned and split."""
    tokenizer: TokenizerParams
    """How text becomes token ids."""
    model: ModelParams
    """The architecture that all stacks share."""
    objective: ObjectiveParams
    """Mask-diffusion while pretraining."""
    n_stacks: int = Field(ge=1)
    """K: how many stacks the rack has."""
    stack: StackParams
    """Defaults of all stacks."""
    stacks: list[StackOverrides]
    """What single stacks do differently, in the order in which they are added (with `append` bottom to top); `{}` is no
    difference. May be shorter than `n_stacks`."""
    growth: GrowthParams
    """How the rack grows."""
    adapters: AdaptersParams
    """Low-rank adapters."""
    optimizer: OptimizerParams
    """AdamW and its learning-rate schedule."""
    compute: ComputeParams
    """Device, precision, threads."""
    trunk: TrunkParams
    """The frozen stacks below the one that trains."""
    joint: JointParams
    """Joint fine-tuning of the whole fused rack."""
    fine_tune: dict[str, FineTuneParams]
    """Branches of fine-tuning, by name: each adapts the fused rack, all in parallel."""
    evaluate: EvaluateParams
    """What is measured on held-out text."""
    analyse: AnalyseParams
    """What is looked at inside the trained rack."""
    samples: SamplesParams
    """The texts that each model writes for the report."""
    export: ExportParams
    """Models for Transformers."""
    activations: ActivationsParams
    """The activation cache on disk. Changes no result."""
    checkpoint: CheckpointParams
    """Resuming interrupted stages. Changes no result."""
    tracking: TrackingParams
    """MLflow. Changes no result."""

    def stack_params(self, k: int) -> StackParams:
        """The parameters of stack `k`: the defaults as they change with k, with its overrides."""
        own = self.stack
        update: dict[str, Any] = {}
        # A stage sees what it declares: of a stack that it does not train no steps and no rate, of the first no factor.
        if k and {"steps", "steps_factor"} <= vars(own).keys():
            update["steps"] = max(1, round(own.steps * own.steps_factor**k))
        if k and {"lr", "lr_factor"} <= vars(own).keys():
            update["lr"] = own.lr * own.lr_factor**k
        if k < len(self.stacks):
            update |= self.stacks[k].model_dump(exclude_none=True, exclude={"attention", "mlp"})
        return own.model_copy(update=update)

    def stack_model(self, k: int) -> ModelParams:
        """The architecture of stack `k`: `model` with its overrides."""
        overrides = self.stacks[k] if k < len(self.stacks) else StackOverrides()
        update: dict[str, Any] = {}
        if overrides.attention is not None:
            update["attention"] = self.model.attention.overridden(overrides.attention)
        if overrides.mlp is not None:
            update["mlp"] = self.model.mlp.overridden(overrides.mlp)
        return self.model.model_copy(update=update)

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit together across sections."""
        found = []
        for k, overrides in enumerate(self.stacks):
            if k >= self.n_stacks and overrides.model_fields_set:
                found.append(
                    (
                        f"stacks.{k}",
                        f"overrides a stack that does not exist: n_stacks is {self.n_stacks}, "
                        f"the last stack is {self.n_stacks - 1}",
                    )
                )
        found += self._override_problems()
        found += self._tokenizer_problems()
        found += self._objective_problems()
        found += self._time_problems()
        found += self._growth_problems()
        found += self._start_problems()
        found += self._export_problems()
        found += self._time_step_problems()
        found += self._scorer_problems()
        found += self._branch_problems()
        for k, overrides in enumerate(self.stacks[: self.n_stacks]):
            if overrides.init == "copy" and self.growth.copied_by(k) is None:
                found.append((f"stacks.{k}.init", "there is no trained stack to copy: expected random or zero"))
        sizes = {"stack.batch_size": self.stack.batch_size, "joint.batch_size": self.joint.batch_size}
        sizes |= {f"stacks.{k}.batch_size": s.batch_size for k, s in enumerate(self.stacks) if s.batch_size}
        sizes |= {f"fine_tune.{name}.batch_size": branch.batch_size for name, branch in self.fine_tune.items()}
        for path, size in sizes.items():
            if size % self.optimizer.accumulate:
                found.append((path, f"expected a multiple of optimizer.accumulate ({self.optimizer.accumulate})"))
        return found

    def _growth_problems(self) -> list[tuple[str, str]]:
        """A regime, formats or adapters that do not fit the stacks or the objective."""
        growth, found = self.growth, []
        if growth.mode == "layerwise":
            message = "expected 1, because growth.mode is layerwise"
            found += [("stack.blocks", message)] * (self.stack.blocks != 1)
            found += [(f"stacks.{k}.blocks", message) for k, s in enumerate(self.stacks) if s.blocks not in (None, 1)]
        masked = self.objective.type in MASKED
        for key in ("masks", "consistency"):
            if not masked and growth.changed((key,)):
                message = f"has no effect with objective.type {self.objective.type}, which masks nothing: leave it out"
                found.append((f"growth.{key}", message))
        if not growth.has_trunk:
            message = "has no effect with this regime of growth, in which every stack learns: leave it out"
            found += [(f"trunk.{key}", message) for key in self.trunk.changed(("activations", "compute", "precisions"))]
        if len(self.trunk.precisions) > self.n_stacks:
            message = f"expected at most {self.n_stacks} formats, one for each of the n_stacks"
            found.append(("trunk.precisions", message))
        return found + self._adapter_problems()

    def _start_problems(self) -> list[tuple[str, str]]:
        """A model to start with that does not fit what is made of it, or keys that mean nothing with it."""
        growth, found = self.growth, []
        if growth.start is None:
            if growth.start_stacks is not None:
                found.append(("growth.start_stacks", "has no effect without growth.start: leave it out"))
            return found
        if growth.start_stacks is None:
            found.append(("growth.start_stacks", "expected a number of stacks, because growth.start is given"))
        elif growth.start_stacks > self.n_stacks:
            found.append(("growth.start_stacks", f"expected at most n_stacks ({self.n_stacks})"))
        for key, section in (("embeddings", self.model.embeddings), ("head", self.model.head)):
            if section.source is not None:
                message = "has no effect with growth.start, which brings its own: leave it out"
                found.append((f"model.{key}.source", message))
        if self.model.time.mode == "input":
            message = "cannot be input with growth.start, whose blocks know no t: expected none or depth"
            found.append(("model.time.mode", message))
        if growth.strategy == "progressive" and not growth.sweeps and growth.trunk != "trainable":
            for k, overrides in enumerate(self.stacks[: growth.imported]):
                for key in sorted(overrides.model_fields_set - {"blocks", "attention", "mlp"}):
                    message = f"has no effect: stack {k} comes from growth.start and is not trained: leave it out"
                    found.append((f"stacks.{k}.{key}", message))
        untrained = growth.strategy == "progressive" and growth.imported == self.n_stacks and not growth.sweeps
        if untrained and self.joint.share:
            message = "expected 0: it is a share of the steps of all stacks, and growth.start leaves none to train"
            found.append(("joint.share", message))
        return found

    def _export_problems(self) -> list[tuple[str, str]]:
        """Models that there are not."""
        racks = (name for name, branch in self.fine_tune.items() if branch.objective != "classification")
        there = ["fused", *racks]
        message = f"expected names of models: {', '.join(there)}"
        return [("export.models", message)] if set(self.export.models) - set(there) else []

    def _scorer_problems(self) -> list[tuple[str, str]]:
        """A scorer that is no causal model."""
        branches = (name for name, branch in self.fine_tune.items() if branch.objective == "clm")
        causal = [*(["fused"] if self.objective.type == "clm" else []), *branches]
        if self.evaluate.scorer is None or self.evaluate.scorer in causal:
            return []
        known = f"expected null or {' or '.join(causal)}" if causal else "expected null"
        return [("evaluate.scorer", f"{known}: the causal models of this pipeline")]

    def _adapter_problems(self) -> list[tuple[str, str]]:
        """Adapters that nobody has, or that somebody must have."""
        growth, found = self.growth, []
        if (growth.trunk == "qlora") != (self.adapters.trunk is not None):
            if growth.trunk == "qlora":
                message = "expected a mapping (`{}` takes every default), because growth.trunk_strategy is qlora"
            else:
                message = "expected null, because growth.trunk_strategy is not qlora: no older stack learns adapters"
            found.append(("adapters.trunk", message))
        if self.adapters.stack is not None and (growth.strategy == "end_to_end" or growth.trunk == "trainable"):
            why = "older stacks learn with all their weights" if growth.trunk == "trainable" else "no stack is added"
            found.append(("adapters.stack", f"expected null: with this regime of growth {why}"))
        if not self.adapters.merge and not (self.adapters.stack or self.adapters.trunk):
            found.append(("adapters.merge", "has no effect without adapters: leave it out"))
        every = {f"adapters.{kind}": getattr(self.adapters, kind) for kind in ("stack", "trunk")}
        every |= {f"fine_tune.{name}.lora": branch.lora for name, branch in self.fine_tune.items()}
        for path, settings in every.items():
            if settings is None or settings.strategy != "variable":
                continue
            for key, needed in (("ranks", True), ("alphas", bool(settings.alphas))):
                if needed and len(getattr(settings, key)) < self.n_stacks:
                    message = f"expected a value for each of the n_stacks ({self.n_stacks}) stacks"
                    found.append((f"{path}.{key}", message))
        return found

    def _time_step_problems(self) -> list[tuple[str, str]]:
        """Time steps of which there are not so many."""
        at_once, objective = self.activations.time_steps_at_once, self.objective
        if at_once is None:
            return []
        if objective.type not in MASKED:
            message = f"expected true: with objective.type {objective.type} a sample has one time step"
            return [("activations.store_all_time_steps", message)]
        if at_once < objective.variants:
            return []
        if objective.variants == 1:
            return [("activations.store_all_time_steps", "expected true: with objective.variants 1 there is one")]
        message = (
            f"expected less than objective.variants ({objective.variants}); for all, set store_all_time_steps to true"
        )
        return [("activations.time_step_cache_size", message)]

    def _branch_problems(self) -> list[tuple[str, str]]:
        """Names of branches that cannot be, and branches that do not fit the rack or the corpus."""
        found = [(f"fine_tune.{name}", message) for name, message in name_problems(self.fine_tune)]
        for name, branch in self.fine_tune.items():
            if self.objective.type == "custom" and branch.objective != "classification":
                message = (
                    "expected no such branch, because with objective.type custom the documents are not whole texts"
                )
                found.append((f"fine_tune.{name}", message))
        return found

    @property
    def _fine_tunes_diffusion(self) -> bool:
        return any(branch.objective == "diffusion" for branch in self.fine_tune.values())

    def _objective_problems(self) -> list[tuple[str, str]]:
        """An objective that does not fit the data, the branches or the times of the stacks."""
        own, found = self.objective, []
        if own.type in MASKED or self._fine_tunes_diffusion:
            unused: tuple[str, ...] = ()
        else:  # one variant is what there is without masks
            unused = tuple(key for key in MASKING if key != "variants" or own.variants != 1)
        for key in own.changed(unused):
            message = f"has no effect with objective.type {own.type} and without a branch for diffusion: leave it out"
            found.append((f"objective.{key}", message))
        if own.by_depth and own.type not in MASKED and not unused:
            message = f"has no effect by depth with objective.type {own.type}, which masks nothing: leave it out"
            found.append(("objective.schedule", message))
        if (own.type == "custom") != (self.data.ids_column is not None):
            message = "expected the name of a column if objective.type is custom, else null"
            found.append(("data.ids_column", message))
        if own.type == "custom":
            if self.tokenizer.type not in ("byte", "pretrained"):
                message = "expected byte or pretrained, because with objective.type custom documents are ids, not text"
                found.append(("tokenizer.type", message))
            if self.evaluate.choices:
                message = "expected [], because with objective.type custom the documents are not whole texts"
                found.append(("evaluate.choices", message))
        return found

    def _time_problems(self) -> list[tuple[str, str]]:
        """Times of the stacks that do not fit the objective or the stacks."""
        own, time, found = self.objective, self.model.time, []
        by_depth = own.by_depth or (time.mode == "depth" and time.mapping != "custom")
        if own.schedule_stacks is not None:
            if not by_depth:
                message = "has no effect where no mask rate goes by depth: leave it out"
                found.append(("objective.schedule_stacks", message))
            elif own.schedule_stacks < self.n_stacks:
                found.append(("objective.schedule_stacks", f"expected at least n_stacks ({self.n_stacks})"))
        if time.mode != "none" and own.type not in MASKED:
            found.append(("model.time.mode", f"expected none: objective.type {own.type} masks nothing, there is no t"))
        if time.mode == "depth":
            if own.schedule is not None:
                message = "cannot be with model.time.mode depth, which gives each stack its mask rate: leave one out"
                found.append(("objective.schedule", message))
            if time.mapping == "custom" and len(time.time_per_stack) < self.n_stacks:
                message = f"expected a t for each of the n_stacks ({self.n_stacks}) stacks"
                found.append(("model.time.time_per_stack", message))
        if time.sampling == "batch":
            path, without = "model.time.sampling", ": leave it out"
            if own.type not in MASKED and not self._fine_tunes_diffusion:
                found.append((path, f"has no effect with objective.type {own.type}, which masks nothing{without}"))
            elif own.schedule is not None:
                found.append((path, f"has no effect with objective.schedule, which sets t{without}"))
            elif own.masks == "pool":
                found.append((path, f"cannot be batch with objective.masks pool: its masks would be equal{without}"))
            for k, stack in enumerate(self.stacks):
                if stack.batch_size not in (None, self.stack.batch_size):
                    message = f"expected that of stack ({self.stack.batch_size}), because model.time.sampling is batch"
                    found.append((f"stacks.{k}.batch_size", f"{message}: all stacks see the same batches"))
        return found

    def _tokenizer_problems(self) -> list[tuple[str, str]]:
        """A tokenizer whose ids are not those of the pretrained matrices, or none at all."""
        sections = {"model.embeddings.source": self.model.embeddings, "model.head.source": self.model.head}
        sources = [(key, section.source) for key, section in sections.items() if section.source is not None]
        if self.growth.start is not None:
            sources = [("growth.start", self.growth.start)]
        tokenizer = self.tokenizer
        if not sources:
            if tokenizer.type != "pretrained" or tokenizer.name:
                return []
            message = (
                "expected a directory or a hub name, because tokenizer.type is pretrained and neither model nor growth "
                "has a source"
            )
            return [("tokenizer.name", message)]
        (key, source), *others = sources
        rows = f"the rows of {key} ({source}) belong to the ids of its own tokenizer"
        found = [(other, f"expected {source} as in {key}: {rows}") for other, its in others if its != source]
        if tokenizer.type != "pretrained":
            found.append(("tokenizer.type", f"expected pretrained, with tokenizer.name null, because {rows}"))
        elif tokenizer.name not in (None, source):
            found.append(("tokenizer.name", f"expected null, because {rows}"))
        return found

    def _override_problems(self) -> list[tuple[str, str]]:
        """Architectures of single stacks that cannot be, or that cannot copy the stack below."""
        found = []
        models = [self.stack_model(k) for k in range(min(len(self.stacks) + 1, self.n_stacks))]
        for k, model in enumerate(models):
            given = self.stacks[k] if k < len(self.stacks) else StackOverrides()
            for name in ("attention", "mlp"):
                if getattr(given, name) is not None:
                    section: Section = getattr(model, name)
                    found += [(f"stacks.{k}.{name}.{key}", message) for key, message in section.problems()]
            if given.attention is not None and not model.attention.problems():
                found += [(f"stacks.{k}.{key}", message) for key, message in model.problems()]
            copied = self.growth.copied_by(k)
            if copied is not None and self.stack_params(k).init == "copy" and not model.same_weights(models[copied]):
                message = f"stack {k} has other weights than stack {copied}, which it cannot copy"
                found.append((f"stacks.{k}.init", f"{message}: expected random or zero"))
        return found


def load(path: str | Path = "params.yaml") -> Params:
    """Read and validate a params file.

    Raises:
        UserError: naming every problem of the file at once.
    """
    path = Path(path)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        content = "is empty" if tree is None else f"holds {_show(tree)}"
        raise UserError(f"{path}: {content}; expected a mapping of sections, as in docs/parameters.md")
    found = list(find_problems(tree))
    if len(found) == 1:
        raise UserError(f"{path}: {found[0]}")
    if found:
        raise UserError("\n  ".join((f"{path}: {len(found)} problems", *found)))
    return Params.model_validate(tree)


def view(params: Params, keys: Iterable[str]) -> Params:
    """`params` with nothing but `keys` (dotted) and the untracked sections; reading anything else is an AttributeError.

    Keys that are absent from the file (an override, a branch) leave the default in place.
    """
    tree: dict[str, Any] = {}
    for key in (*keys, *UNTRACKED):
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = None
    return _restrict(params, tree)


def _restrict(value: Any, tree: Mapping[str, Any]) -> Any:
    kept: dict[str, Any] = {}
    for name, sub in tree.items():
        own = getattr(value, name)
        if sub is None:
            kept[name] = own
        elif isinstance(own, dict):
            kept[name] = {key: own[key] if part is None else _restrict(own[key], part) for key, part in sub.items()}
        elif isinstance(own, list):
            kept[name] = _items(own, sub, StackOverrides() if name == "stacks" else None)
        else:
            kept[name] = _restrict(own, sub)
    part = type(value).model_construct(_fields_set=set(kept), **kept)
    for name in set(part.__dict__) - set(kept):  # defaults that model_construct has filled in
        del part.__dict__[name]
    return part


def _items(values: list[Any], tree: Mapping[str, Any], blank: Any) -> list[Any]:
    """Of a list with an item for each stack: those that are not declared, or not there, are `blank`."""
    return [values[k] if str(k) in tree and k < len(values) else blank for k in range(1 + max(map(int, tree)))]


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text, whatever they look like, and stand only once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen:
                what = f"the key {key.value} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: the file is missing or not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run this where it lies or give its path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        begin = getattr(error, "context_mark", None)
        if begin and mark and begin.line != mark.line:  # of a bracket or a quote that does not end, for instance
            what += f", {getattr(error, 'context', '')} that begins in line {begin.line + 1}"
        raise UserError(f"{path}{where}: not valid YAML: {what}") from None


def find_problems(tree: dict[str, Any]) -> Iterator[str]:
    """Every problem of a params file, a line each; a bad value hides no problem elsewhere."""
    reported: set[tuple[str, ...]] = set()
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        yield from (_explain(**e) for e in errors)
        reported = {tuple(map(str, e["loc"])) for e in errors if e["type"] != "extra_forbidden"}
        try:
            params = Params.model_validate(_without(tree, [e["loc"] for e in errors]))
        except ValidationError:
            return
    wrong = {path[:-1] for path in reported} - {()}  # sections of which a value could not be read
    for path, section in _sections((), params):
        for key, message in section.problems() if path not in wrong else ():
            full = (*path, *key.split("."))
            if full not in reported:
                yield f"{'.'.join(full)} = {_show(_lookup(params, full))}: {message}"


def _without(tree: Any, paths: Iterable[tuple[int | str, ...]]) -> Any:
    """A copy of `tree` with what is harmless in place of the values at `paths`."""
    tree = copy.deepcopy(tree)
    for *parents, last in paths:
        if isinstance(last, int) and _section_at((*parents, last)) is None:  # an item of a list of plain values
            last = parents.pop()
        owner = _section_at(parents)
        if parents and owner is not None and last in owner.model_fields and owner.model_fields[last].is_required():
            last = parents.pop()  # a mapping is nothing without what it must have
        node = tree
        for part in parents:
            node = node.get(part, {}) if isinstance(node, dict) else node[part]
        if isinstance(last, int):
            node[last] = {}
        elif not parents and last in Params.model_fields:
            node[last] = _HARMLESS.get(last, {})
        else:
            node.pop(last, None)
    return tree


def _sections(path: tuple[str, ...], section: Section) -> Iterator[tuple[tuple[str, ...], Section]]:
    """`section` and all sections within it, each with its path."""
    yield path, section
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _sections((*path, name), value)
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, Section):
                    yield from _sections((*path, name, key), item)


def _explain(*, type: str, loc: tuple[int | str, ...], input: Any, **_: Any) -> str:
    """One line for one of pydantic's errors: path, value, what is allowed, the nearest valid name."""
    path = ".".join(map(str, loc))
    known = _section_at(loc[:-1])
    if type in ("extra_forbidden", "invalid_key") and known is not None:
        return f"{path} = {_show(input)}: no such parameter; {_suggest(loc, known)}"
    schema = _json_schema()
    part = at(schema, loc)
    assert part is not None, loc
    allowed = in_words(schema, part)
    part = dereference(schema, part)
    if type == "missing":
        default = {"object": "; `{}` takes every default", "array": "; `[]` is an empty one"}.get(part["type"], "")
        return f"{path}: missing; expected {allowed}{default}"
    return f"{path} = {_show(input)}: expected {allowed}{_hint(input, part)}"


@cache
def _json_schema() -> dict[str, Any]:
    return Params.model_json_schema()


def _suggest(loc: tuple[int | str, ...], section: type[Section]) -> str:
    """What an unknown key of `section` may be meant to be."""
    *parents, key = map(str, loc)
    if near := difflib.get_close_matches(key, section.model_fields, 1):
        return f"did you mean {'.'.join((*parents, near[0]))}?"
    if elsewhere := next(_paths_of(key), None):
        return f"did you mean {'.'.join((*elsewhere, key))}?"
    return f"the keys here are {', '.join(section.model_fields)}"


def _hint(value: Any, part: Mapping[str, Any]) -> str:
    """How a value that is wrong in a common way is written right."""
    if "enum" in part and isinstance(value, str):
        near = difflib.get_close_matches(value, part["enum"], 1)
        return f"; did you mean {near[0]}?" if near else ""
    if part.get("type") not in ("integer", "number") or (number := _number(value)) is None:
        return ""
    text = "; this is text in YAML, not a number" if isinstance(value, str) else ""
    if part["type"] == "integer":
        return f"{text}; write {int(number)}" if number.is_integer() else text
    return f"{text}; write {as_yaml(number)}" if text else ""


def _section_at(loc: Iterable[int | str]) -> type[Section] | None:
    """The section class at a path of `Params`."""
    found: type[Section] | None = Params
    keyed = False
    for part in loc:
        if found is None or isinstance(part, int):
            continue
        if keyed:  # the key of a mapping whose values are sections
            keyed = False
            continue
        annotation = found.model_fields[part].annotation if part in found.model_fields else None
        found, keyed = section_of(annotation), get_origin(annotation) is dict
    return found


def section_of(annotation: Any) -> type[Section] | None:
    """The section class in an annotation such as `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def _paths_of(key: str, section: type[Section] = Params, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the sections that know `key`."""
    for name, field in section.model_fields.items():
        if (inner := section_of(field.annotation)) is not None:
            if key in inner.model_fields:
                yield (*path, name)
            yield from _paths_of(key, inner, (*path, name))


def _lookup(node: Any, path: Iterable[str]) -> Any:
    """The value at a path of the parameters; None where there is none."""
    for part in path:
        if isinstance(node, list):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        elif isinstance(node, dict):
            node = node.get(part)
        else:
            node = getattr(node, part, None)
    return node.model_dump(exclude_unset=True) if isinstance(node, Section) else node


def _show(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: Any) -> float | None:
    """The finite number that a text or a float holds."""
    try:
        number = float(value) if isinstance(value, (str, float)) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
