"""`params.yaml` as a whole: loading, validation with all problems at once, a stage's view."""

import copy
import difflib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError

from stackwise.config.compute import ActivationsParams, ComputeParams, TrunkParams
from stackwise.config.data import DataParams, TokenizerParams
from stackwise.config.evaluation import EvaluateParams, ReportParams
from stackwise.config.model import ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.section import Section
from stackwise.config.tracking import TrackingParams
from stackwise.config.training import (
    CheckpointParams,
    FineTuneParams,
    JointParams,
    OptimizerParams,
    StackOverrides,
    StackParams,
)
from stackwise.errors import UserError

UNTRACKED = ("activations", "checkpoint", "tracking")
"""Sections that change no result: every stage may read them, none declares them."""


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
    """What single stacks do differently, bottom to top; `{}` is no difference. May be shorter than `n_stacks`."""
    optimizer: OptimizerParams
    """AdamW and its learning-rate schedule."""
    compute: ComputeParams
    """Device, precision, threads."""
    trunk: TrunkParams
    """The frozen stacks below the one that trains."""
    joint: JointParams
    """Joint fine-tuning of the whole fused rack."""
    fine_tune: FineTuneParams
    """Fine-tuning branches of the fused rack."""
    evaluate: EvaluateParams
    """What is measured on held-out text."""
    report: ReportParams
    """The samples of text in the report."""
    activations: ActivationsParams
    """The activation cache on disk. Changes no result."""
    checkpoint: CheckpointParams
    """Resuming interrupted stages. Changes no result."""
    tracking: TrackingParams
    """MLflow. Changes no result."""

    def stack_params(self, k: int) -> StackParams:
        """The parameters of stack `k`: the defaults with its overrides."""
        overrides = self.stacks[k].model_dump(exclude_none=True) if k < len(self.stacks) else {}
        return self.stack.model_copy(update=overrides)

    def problems(self) -> list[tuple[str, str]]:
        found = []
        for k, overrides in enumerate(self.stacks):
            if k >= self.n_stacks and overrides.model_fields_set:
                found.append(
                    (
                        f"stacks.{k}",
                        f"overrides a stack that does not exist: n_stacks is {self.n_stacks}, the last stack is {self.n_stacks - 1}",
                    )
                )
        if self.stacks and self.stacks[0].init == "copy":
            found.append(("stacks.0.init", "the first stack has none below it to copy: expected random or zero"))
        sizes = {"stack.batch_size": self.stack.batch_size, "joint.batch_size": self.joint.batch_size}
        sizes |= {f"stacks.{k}.batch_size": s.batch_size for k, s in enumerate(self.stacks) if s.batch_size}
        for branch in FineTuneParams.model_fields:
            if params := getattr(self.fine_tune, branch):
                sizes[f"fine_tune.{branch}.batch_size"] = params.batch_size
        for path, size in sizes.items():
            if size % self.optimizer.accumulate:
                found.append((path, f"expected a multiple of optimizer.accumulate ({self.optimizer.accumulate})"))
        return found


def load(path: str | Path = "params.yaml") -> Params:
    """Read and validate a params file.

    Raises:
        UserError: naming every problem of the file at once.
    """
    path = Path(path)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {_show(tree)}")
    found = list(_find_problems(tree))
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise UserError(f"{path}: {len(found)} problem{'s' * (len(found) > 1)}{lines}")
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
    if isinstance(value, list):  # of overrides: those that are not declared read as no difference
        return [item if str(k) in tree else type(item)() for k, item in enumerate(value)]
    kept = {k: getattr(value, k) if sub is None else _restrict(getattr(value, k), sub) for k, sub in tree.items()}
    part = type(value).model_construct(_fields_set=set(kept), **kept)
    for name in set(part.__dict__) - set(kept):  # defaults that model_construct has filled in
        del part.__dict__[name]
    return part


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    mark = key_node.start_mark
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands here twice", mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: the file is missing or not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run this where it lies or give its path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{where}: not valid YAML: {what}") from None


def _find_problems(tree: dict[Any, Any]) -> Iterator[str]:
    """Every problem of a params file, a line each; a bad value hides no problem elsewhere."""
    wrong: set[tuple[int | str, ...]] = set()  # sections with a value that could not be read
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        yield from (_explain(**e) for e in error.errors())
        wrong = {e["loc"][:-1] for e in error.errors() if e["type"] != "extra_forbidden"}
        try:
            params = Params.model_validate(_without(tree, [e["loc"] for e in error.errors()]))
        except ValidationError:
            return
    for path, section in _sections((), params):
        if path in wrong:
            continue
        for key, message in section.problems():
            full = (*path, *key.split("."))
            yield f"{'.'.join(full)} = {_show(_lookup(tree, full))}: {message}"


def _without(tree: Any, paths: Iterable[tuple[int | str, ...]]) -> Any:
    """A copy of `tree` that lacks the values at `paths`; a missing section is there with its defaults."""
    tree = copy.deepcopy(tree)
    for *parents, last in paths:
        node = tree
        for part in parents:
            node = node[part]
        if isinstance(node, dict):
            section = _section_at((*parents, last))
            node.pop(last, None)
            if not parents and section is not None:
                node[last] = {} if _section_of(Params.model_fields[str(last)].annotation) is section else []
        elif isinstance(last, int):
            node[last] = {}
    return tree


def _sections(path: tuple[str, ...], section: Section) -> Iterator[tuple[tuple[str, ...], Section]]:
    """`section` and all sections within it, each with its path."""
    yield path, section
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _sections((*path, name), value)


def _explain(*, type: str, loc: tuple[int | str, ...], msg: str, input: Any, **_: Any) -> str:
    """One line for one of pydantic's errors: path, value, what is allowed, the nearest valid name."""
    path = ".".join(map(str, loc))
    known = _section_at(loc[:-1])
    if type == "extra_forbidden" and known is not None:
        key = str(loc[-1])
        near = difflib.get_close_matches(key, known.model_fields, 1)
        elsewhere = [".".join((*p, key)) for p in _paths_of(key)]
        prefix = ".".join(map(str, loc[:-1]))
        hint = (
            f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
            if near
            else (
                f"did you mean {elsewhere[0]}?" if elsewhere else f"the keys here are {', '.join(known.model_fields)}"
            )
        )
        return f"{path} = {_show(input)}: no such parameter; {hint}"
    if type == "missing":
        default = "{}" if _section_at(loc) not in (None, known) else "..."
        return f"{path}: missing; write `{path}: {default}` (docs/parameters.md lists its values)"
    expected = msg[0].lower() + msg[1:]
    expected = re.sub(r"^(value error, |input should be (a valid )?)", "", expected)
    expected = expected if expected.startswith("expected") else f"expected {expected}"
    if type == "literal_error" and isinstance(input, str):
        near = difflib.get_close_matches(input, re.findall(r"'([^']+)'", msg), 1)
        expected += f"; did you mean {near[0]}?" if near else ""
    if type in ("float_type", "int_type") and isinstance(input, str) and _is_number(input):
        expected += f"; YAML reads {input} as text: write {float(input):#.6g} without quotes"
    if type == "model_type":
        expected = "expected a mapping of keys"
    return f"{path} = {_show(input)}: {expected}"


def _section_at(loc: Iterable[int | str]) -> type[Section] | None:
    """The section class at a path of `Params`."""
    found: type[Section] | None = Params
    for part in loc:
        if found is None or isinstance(part, int):
            continue
        found = _section_of(found.model_fields[part].annotation) if part in found.model_fields else None
    return found


def _section_of(annotation: Any) -> type[Section] | None:
    """The section class in an annotation such as `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _paths_of(key: str, section: type[Section] = Params, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the sections that know `key`."""
    for name, field in section.model_fields.items():
        if (inner := _section_of(field.annotation)) is not None:
            if key in inner.model_fields:
                yield (*path, name)
            yield from _paths_of(key, inner, (*path, name))


def _lookup(tree: Any, path: Iterable[str]) -> Any:
    """The value at a path of the file; None where the file leaves it to its default."""
    for part in path:
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict):
            tree = tree.get(part)
        else:
            return None
    return tree


def _show(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
