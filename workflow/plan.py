"""What the pipeline of a params file will take, before anything of it runs: `stackwise plan`.

The arithmetic is that of `stackwise.plan`; this composes it for the stages of the table. No torch is imported.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from stackwise.artifacts.manifest import MANIFEST
from stackwise.cache.sizes import boundary_bytes, boundary_shard_rows, rows_made
from stackwise.config.objective import MASKED
from stackwise.config.params import Params, load
from stackwise.errors import UserError
from stackwise.growth.phases import Phase, phases
from stackwise.plan import weights
from stackwise.plan.parts import Sizes, StackPlan, Vocabulary
from stackwise.plan.phase import frozen_stack, rows_of_phase, steps_of_phase
from stackwise.plan.rates import ACCELERATORS, UTILISATION, accelerator, rate_of
from stackwise.plan.step import Cost, cost_of_pass, cost_of_step
from stackwise.plan.tape import Device
from stackwise.plan.tuning import Tuning, branch_tuning, joint_tuning

PROCESS = 9 * 10**8
"""A Python process with torch loaded (bytes)."""
_TOKENS = Path("artifacts/tokens")
_BYTES = 257
"""Ids of the byte tokenizer: bytes and the end of a text."""


@dataclass(frozen=True)
class Corpus:
    """What is known only after tokenizing."""

    vocab_size: int
    samples: int | None
    """Of the training split; None if nobody knows yet."""


@dataclass(frozen=True)
class StageCost:
    """What one stage takes."""

    name: str
    learns: int = 0
    """Weights that learn."""
    frozen: dict[str, int] = field(default_factory=dict)
    """Weights that do not, by format."""
    device: int = 0
    """Most memory on the device that computes (bytes); on a CPU it is of the host."""
    host: int = PROCESS
    """Most memory of the host besides (bytes)."""
    cache: int | None = 0
    """Of the boundary that it keeps on disk (bytes); None if the corpus is not known yet."""
    flops: int | None = 0
    """Operations (2 for a multiplication with an addition); None likewise."""


def costs(params: Params, corpus: Corpus, device: Device) -> list[StageCost]:
    """Of the stages that compute with the model, in the order in which they run."""
    return list(_Planner(params, corpus, device).costs())


def _remembered(function: Callable[..., Cost]) -> Callable[..., Cost]:
    """Most phases of a rack take the same step. Parameters hold lists, so what they say is the key."""
    memory: dict[str, Cost] = {}

    def remembering(*arguments: object) -> Cost:
        key = repr(arguments)
        if key not in memory:
            memory[key] = function(*arguments)
        return memory[key]

    return remembering


_cost_of_step, _cost_of_pass = _remembered(cost_of_step), _remembered(cost_of_pass)


class _Planner:
    def __init__(self, params: Params, corpus: Corpus, device: Device) -> None:
        self._params, self._corpus, self._device = params, corpus, device
        self._phases = phases(params.growth, params.n_stacks, lora=params.adapters.stack is not None)
        widths = (params.model.d_model, params.model.d_model)
        self._weights, self._predicting = cache(self._count), cache(self._predict)
        self._vocabulary = Vocabulary(params.model, corpus.vocab_size, *widths)
        own = params.model, corpus.vocab_size
        self._ends = sum(
            part(*own, params.model.d_model).learnable for part in (weights.embeddings_weights, weights.head_weights)
        )

    def costs(self) -> Iterator[StageCost]:
        quantized: set[tuple[int, int]] = set()
        for phase in self._phases:
            for version in (*phase.below, *phase.quantized):
                if (version.stack, version.weights) not in quantized:
                    quantized.add((version.stack, version.weights))
                    sweep = self._phases[version.weights].sweep
                    name = f"quantize_trunk_{version.stack}" + f"_sweep_{sweep}" * bool(sweep)
                    yield StageCost(name, host=PROCESS + 8 * self._weights(version.stack))
            if phase.cached:
                yield self._caching(phase)
            yield StageCost("import") if phase.imported else self._training(phase)
            if len(phase.kept) == len(phase.order):
                yield self._reading(f"evaluate_{phase.name}", phase.order)
        everything = range(self._params.n_stacks)
        yield StageCost("fuse", host=PROCESS + 8 * (self._ends + sum(map(self._weights, everything))))
        joint = self._params.joint
        if joint.share:
            steps = round(
                joint.share * sum(self._params.stack_params(p.stack).steps for p in self._phases if not p.imported)
            )
            tuning = joint_tuning(self._params, self._vocabulary, self._device)
            yield self._tuning("tune_jointly", steps, tuning)
        for name, branch in self._params.fine_tune.items():
            tuning = branch_tuning(self._params, name, self._vocabulary, self._device)
            yield self._tuning(f"fine_tune_{name}", branch.steps, tuning)
        for name in ("fused", *self._params.fine_tune):
            yield self._reading(f"evaluate_{name}", everything)
            learned = self._params.objective.type if name == "fused" else self._params.fine_tune[name].objective
            if learned not in ("custom", "classification"):
                yield self._writing(name, learned, everything)

    def _training(self, phase: Phase) -> StageCost:
        own, accumulate = self._params.stack_params(phase.stack), self._params.optimizer.accumulate
        rows = rows_of_phase(self._params, phase, own.batch_size // accumulate)
        # What steps take on average, and the most memory that any may take.
        every = self._steps(phase, round(rows.mean))
        peak = self._steps(phase, rows.most)[-1][1]
        learns, frozen = self._members(phase)
        stored = sum(frozen.values())
        flops = sum(number * cost.flops.total for number, cost in every)
        if phase.cached and self._limited and self._corpus.samples is not None:
            flops += self._rows_made(phase, self._corpus.samples)[1] * self._row(phase)[1]
        return StageCost(
            f"train_{phase.name}",
            learns=learns,
            frozen=frozen,
            device=peak.peak,
            host=PROCESS + peak.batches + (4 * (learns + stored) if self._device == "cuda" else 0),
            flops=flops,
        )

    def _steps(self, phase: Phase, rows: int) -> list[tuple[int, Cost]]:
        """How many steps of a phase cost what, in order."""
        kinds = steps_of_phase(self._params, phase, self._vocabulary, rows=rows, device=self._device)
        return [(number, _cost_of_step(step)) for number, step in kinds]

    def _members(self, phase: Phase) -> tuple[int, dict[str, int]]:
        """Weights that learn in a phase, and those that do not by their format."""
        params, frozen = self._params, dict[str, int]()
        own = (params.model, self._corpus.vocab_size, params.model.d_model)
        learns = weights.head_weights(*own).learnable
        if phase.embeddings_learn:
            learns += weights.embeddings_weights(*own).learnable
        for member in phase.window:
            k, settings = member.stack, None
            number = self._weights(k)
            match member.role:
                case "new" | "weights":
                    learns += number
                case "lora":
                    settings, kept = params.adapters.stack, "full"
                case "adapters":
                    settings, kept = params.adapters.trunk, params.trunk.precision_of(k)
                case "frozen":
                    kept = params.trunk.precision_of(k)
                case "initial":
                    kept = "full"
            if member.role not in ("new", "weights"):
                frozen[kept] = frozen.get(kept, 0) + number
            if settings is not None:
                targets = None if settings.target_modules is None else frozenset(settings.target_modules)
                part = weights.stack_weights(params.stack_model(k), params.stack_params(k).blocks)
                learns += weights.lora_weights(part, settings.rank_of(k), targets).learnable
        if not phase.cached:
            for version in phase.below:
                kept = params.trunk.precision_of(version.stack)
                frozen[kept] = frozen.get(kept, 0) + self._weights(version.stack)
        return learns, frozen

    def _caching(self, phase: Phase) -> StageCost:
        params, samples = self._params, self._corpus.samples
        activations, variants = params.activations, self._variants
        one, row = self._row(phase)
        stored = flops = None
        if samples is not None:
            flops = self._rows_made(phase, samples)[0] * row
            stored = boundary_bytes(
                samples * variants,
                params.seq_len,
                params.model.d_model,
                params.trunk.activations,
                activations.shard_mb,
                variants=variants,
                at_once=activations.time_steps_at_once,
            )
        k = phase.below[-1].stack
        frozen: dict[str, int] = {params.trunk.precision_of(k): self._weights(k)}
        return StageCost(f"cache_activations_{phase.label}", frozen=frozen, device=one, cache=stored, flops=flops)

    def _row(self, phase: Phase) -> tuple[int, int]:
        """Of the boundary below a phase: the most memory while it is made (bytes), and the operations of a row."""
        params, objective = self._params, self._params.objective
        # Where few time steps are there at once, a boundary below may have them, but need not.
        through = phase.below if self._limited or self._from_tokens(phase) else phase.below[-1:]
        # Rows are computed 32 at a time, or fewer where they are long.
        sizes = Sizes(
            batch=1, seq=params.seq_len, rows=0, causal=objective.looks_back, segments=params.model.document_mask
        )
        compute = params.trunk.compute or params.compute.dtype
        passes = [_cost_of_pass(frozen_stack(params, version), sizes, compute, self._device) for version in through]
        return max(cost.peak for cost in passes), sum(cost.flops.total for cost in passes)

    def _rows_made(self, phase: Phase, samples: int) -> tuple[int, int]:
        """Rows of the boundary below a phase: those that are cached before it, and those that it makes again."""
        params, own = self._params, self._params.stack_params(phase.stack)
        return rows_made(
            samples * self._variants,
            boundary_shard_rows(
                params.seq_len, params.model.d_model, params.trunk.activations, params.activations.shard_mb
            ),
            variants=self._variants,
            at_once=params.activations.time_steps_at_once or self._variants,
            passes=math.ceil(own.steps * own.batch_size / samples),
        )

    @property
    def _variants(self) -> int:
        """Mask variants of each sample in a cache."""
        return self._params.objective.variants if self._params.objective.type in MASKED else 1

    @property
    def _limited(self) -> bool:
        """Whether they are not all on disk at the same time."""
        return (self._params.activations.time_steps_at_once or self._variants) < self._variants

    def _from_tokens(self, phase: Phase) -> bool:
        """Whether its boundary is computed through all stacks below, not from the boundary before."""
        time, objective = self._params.model.time, self._params.objective
        own_masks = time.mode == "depth" or objective.by_depth or self._params.growth.masks == "redraw"
        return own_masks or len(phase.below) == 1

    def _tuning(self, name: str, steps: int, tuning: Tuning) -> StageCost:
        """All stacks together."""
        # What a step takes on average, and the most memory that any may take.
        mean = _cost_of_step(replace(tuning.step, sizes=replace(tuning.step.sizes, rows=tuning.mean_rows)))
        peak = _cost_of_step(tuning.step)
        # What is quantized has been read in fp32, a stack at a time.
        largest = max(map(self._weights, range(self._params.n_stacks))) if tuning.frozen else 0
        stored = 4 * (tuning.learns + sum(tuning.frozen.values())) if self._device == "cuda" else 4 * largest
        return StageCost(
            name,
            learns=tuning.learns,
            frozen=tuning.frozen,
            device=peak.peak,
            host=PROCESS + peak.batches + stored,
            flops=steps * mean.flops.total,
        )

    def _reading(self, name: str, stacks: Iterable[int]) -> StageCost:
        """A whole rack in fp32 that predicts masked tokens."""
        params, stacks = self._params, list(stacks)
        own, seq = params.evaluate, params.seq_len
        number = self._ends + sum(map(self._weights, stacks))
        one = sum(map(self._predicting, stacks))
        # The bound masks half of the tokens on average.
        shares = [0.5] * own.draws + own.mask_rates
        head = 2 * params.model.d_model * self._corpus.vocab_size * seq
        flops = own.samples * round(len(shares) * one + sum(shares) * head)
        return StageCost(name, frozen={"full": number}, device=4 * number, host=PROCESS + 4 * number, flops=flops)

    def _writing(self, name: str, learned: str, stacks: Iterable[int]) -> StageCost:
        """A whole rack in fp32 that writes texts: each takes a pass a step, or one in all from left to right."""
        params, own = self._params, self._params.samples
        number = self._ends + sum(map(self._weights, stacks))
        passes = 1 if learned == "clm" else min(own.steps, params.seq_len)
        one = sum(map(self._predicting, stacks)) + 2 * params.model.d_model * self._corpus.vocab_size * params.seq_len
        flops = own.number * len(own.prompts) * passes * one
        host = PROCESS + 4 * number
        return StageCost(f"sample_{name}", frozen={"full": number}, device=4 * number, host=host, flops=flops)

    def _count(self, k: int) -> int:
        """Weights of a stack."""
        return weights.stack_weights(self._params.stack_model(k), self._params.stack_params(k).blocks).learnable

    def _predict(self, k: int) -> int:
        """Operations of a stack in fp32 on one sample."""
        plan = StackPlan(self._params.stack_model(k), self._params.stack_params(k).blocks)
        return _cost_of_pass(plan, Sizes(batch=1, seq=self._params.seq_len, rows=0), "fp32", "cpu").flops.total


# --- what does not fit

REMEDIES: list[tuple[str, dict[str, Any]]] = [
    ("compute: {activation_checkpointing: true}", {"compute.activation_checkpointing": True}),
    ("optimizer: {state: int8}", {"optimizer.state": "int8"}),
    ("compute: {dtype: bf16}", {"compute.dtype": "bf16"}),
    ("trunk: {precision: nf4}", {"trunk.precision": "nf4"}),
    (
        "optimizer: {in_backward: true, grad_clip: null, accumulate: 1}",
        {"optimizer.in_backward": True, "optimizer.grad_clip": None, "optimizer.accumulate": 1},
    ),
    ("growth: {window: 0, trunk_strategy: null}", {"growth.window": 0, "growth.trunk_strategy": None}),
]
"""Settings that save memory of training, and what they are as values by path."""


def remedies(params: Params, corpus: Corpus, device: Device, memory: float) -> list[str]:
    """The settings with each of which alone every training fits; if there is none, all that help, if these do together.

    Args:
        params: with which some do not fit.
        corpus: sizes of the data.
        device: that computes.
        memory: what it has (bytes).
    """
    tried = [*REMEDIES, *_micro_batches(params), *_smaller_stacks(params)]

    def peak(changes: dict[str, Any]) -> float:
        changed = _changed(params, changes)
        if changed is None:
            return math.inf
        return max(cost.device for cost in costs(changed, corpus, device) if cost.learns)

    now = peak({})
    peaks = {text: peak(changes) for text, changes in tried}
    if alone := [text for text, found in peaks.items() if found <= memory]:
        return alone
    helping = [(text, changes) for text, changes in tried if peaks[text] < now]
    together: dict[str, Any] = {}
    used: list[str] = []
    for text, changes in sorted(helping, key=lambda item: peaks[item[0]]):
        if peak(together | changes) < peak(together):
            together |= changes
            used.append(text)
        if peak(together) <= memory:
            return [" and ".join(used)]
    return []


def _micro_batches(params: Params) -> list[tuple[str, dict[str, Any]]]:
    """A sample at a time."""
    size = params.stack.batch_size
    return [(f"optimizer: {{accumulate: {size}}}", {"optimizer.accumulate": size})] if size > 1 else []


def _smaller_stacks(params: Params) -> list[tuple[str, dict[str, Any]]]:
    """More stacks of fewer blocks."""
    blocks = params.stack.blocks
    if blocks == 1 or any(stack.blocks for stack in params.stacks):
        return []
    number = params.n_stacks * blocks
    return [(f"stack: {{blocks: 1}}, n_stacks: {number}", {"stack.blocks": 1, "n_stacks": number})]


def _changed(params: Params, changes: dict[str, Any]) -> Params | None:
    """The parameters with other values; None if they cannot be."""
    tree = params.model_dump(exclude_unset=True)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    changed = Params.model_validate(tree)
    sections = [changed, *(getattr(changed, name) for name in Params.model_fields)]
    return None if any(s.problems() for s in sections if hasattr(s, "problems")) else changed


# --- the command


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    parser.add_argument(
        "--device",
        choices=sorted(ACCELERATORS),
        default="cpu",
        help="what computes, for times and memory (default: cpu)",
    )
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, help="share of its peak (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, help="operations per second that were measured, in place of these two")
    parser.add_argument("--memory", type=float, help="memory of the device in GB (10^9 bytes), if another")
    parser.add_argument("--training-tokens", type=float, help="tokens of the corpus, before it is tokenized")
    parser.add_argument("--vocab-size", type=int, help="ids of the tokenizer, before it is trained")


def run(arguments: argparse.Namespace) -> None:
    """Print the plan."""
    params = load(arguments.params)
    corpus = known_corpus(params, usual_vocabulary=arguments.vocab_size)
    if arguments.vocab_size is not None:
        corpus = replace(corpus, vocab_size=arguments.vocab_size)
    if arguments.training_tokens is not None:
        corpus = replace(corpus, samples=int(arguments.training_tokens) // params.seq_len)
    device: Device = "cpu" if arguments.device == "cpu" else "cuda"
    rate = arguments.rate or rate_of(arguments.device, arguments.utilisation)
    planned = costs(params, corpus, device)
    print(_table(planned, rate))
    tokens = sum(
        params.stack_params(p.stack).steps * params.stack_params(p.stack).batch_size * params.seq_len
        for p in phases(params.growth, params.n_stacks)
        if not p.imported
    )
    at = (
        f"{arguments.rate:.3g} operations a second"
        if arguments.rate
        else (f"{arguments.utilisation:.0%} of the peak of {arguments.device}")
    )
    print(f"\n{tokens:,} tokens are trained on. Times are at {at}.")
    if corpus.samples is None:
        print("Sizes of the cache need the corpus: run `tokenize` first, or give --training-tokens.")
    own = accelerator(arguments.device).memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = arguments.memory * 1e9 if arguments.memory else own
    _say_what_does_not_fit(planned, params, corpus, device, memory)


def _say_what_does_not_fit(
    planned: list[StageCost], params: Params, corpus: Corpus, device: Device, memory: float
) -> None:
    tight = [cost for cost in planned if cost.device + (cost.host if device == "cpu" else 0) > memory]
    if not tight:
        print(f"Everything fits into {_bytes(memory)} of memory.")
        return
    names = ", ".join(cost.name for cost in tight[:4]) + (f" and {len(tight) - 4} more" if len(tight) > 4 else "")
    print(f"Does not fit into {_bytes(memory)} of memory: {names}.")
    if any(cost.learns for cost in tight):
        found = remedies(params, corpus, device, memory - (PROCESS if device == "cpu" else 0))
        print("  Training fits with " + "; or with ".join(found) if found else "  No setting makes training fit.")
    if any(not cost.learns for cost in tight):
        print("  Stages that read a whole rack fit on a machine with that memory, with compute: {device: cpu}.")


def known_corpus(params: Params, *, usual_vocabulary: int | None = None) -> Corpus:
    """What the parameters and, if it is there, the tokens artifact of this project say.

    Args:
        params: of the project.
        usual_vocabulary: what to take where nobody knows.

    Raises:
        UserError: nobody knows the size of the vocabulary, and nothing is to be taken for it.
    """
    vocab_size, samples = params.tokenizer.vocab_size, None
    if (_TOKENS / MANIFEST).exists():
        facts = json.loads((_TOKENS / MANIFEST).read_text())["facts"]
        vocab_size, samples = facts["vocab_size"], facts["train"]["tokens"] // params.seq_len
    elif vocab_size is None and params.tokenizer.type == "byte":
        vocab_size = _BYTES
    vocab_size = vocab_size or usual_vocabulary
    if vocab_size is None:
        raise UserError(
            "tokenizer.vocab_size = null: not known before the tokenizer is there; run `dvc repro tokenize`, or give "
            "--vocab-size"
        )
    return Corpus(vocab_size, samples)


def _table(planned: list[StageCost], rate: float) -> str:
    rows = [("stage", "learns", "frozen", "device", "host", "cache", "operations", "time")]
    for cost in planned:
        frozen = " ".join(f"{_number(n)} {precision}" for precision, n in cost.frozen.items())
        rows.append(
            (
                cost.name,
                _number(cost.learns),
                frozen or "-",
                _bytes(cost.device),
                _bytes(cost.host),
                "?" if cost.cache is None else _bytes(cost.cache),
                "?" if cost.flops is None else _number(cost.flops),
                "?" if cost.flops is None else _time(cost.flops / rate),
            )
        )
    flops = sum(cost.flops or 0 for cost in planned)
    rows.append(
        (
            "all, or most",
            _number(max(cost.learns for cost in planned)),
            "-",
            _bytes(max(cost.device for cost in planned)),
            _bytes(max(cost.host for cost in planned)),
            _bytes(_two_at_once([cost.cache or 0 for cost in planned if cost.cache != 0])),
            _number(flops),
            _time(flops / rate),
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i in (0, 2) else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines.insert(-1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def _two_at_once(caches: list[int]) -> int:
    """The most bytes of a boundary and the one that it is made from."""
    return max((sum(pair) for pair in pairwise([0, *caches])), default=0)


def _number(n: float) -> str:
    """With three digits: 1.23 M."""
    if not n:
        return "-"
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:g}"


def _bytes(n: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return "-" if not n else f"{n / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    if not seconds:
        return "-"
    if seconds >= 3 * 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
