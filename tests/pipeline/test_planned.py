"""The plan of every regime against its trainings: their operations and memory, and the bytes of their boundaries."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.meter import Meter
from stackwise.cache.boundary import Boundaries
from stackwise.config.compute import ActivationsParams
from stackwise.config.params import Params
from stackwise.data.tokens import open_tokens
from stackwise.growth.run import GrowthRun
from stackwise.interactive.watching import Silent
from stackwise.training import loop
from tests.conftest import COVERED
from tests.pipeline.inprocess import BASE, Changes, changed
from tests.pipeline.test_regimes import REGIMES
from workflow.inprocess import inside
from workflow.plan import Corpus, costs

CPU = torch.device("cpu")
VOCAB = 257
COMMON: Changes = {
    "n_stacks": 3,
    "seq_len": 32,
    "data.dummy_documents": 8,
    "model": {"d_model": 64, "attention": {"n_heads": 2}, "mlp": {"hidden": 160}},
    # every batch asks for as many tokens
    "objective": {"variants": 2, "count": "exact", "mask_min": 0.5, "mask_max": 0.5},
    "stack": {"blocks": 2, "steps": 4, "batch_size": 8, "lr": 1.0e-3, "init": "copy"},
    "stacks": [],
    "fine_tune": {},
    "trunk.activations": "fp32",
}
PREPEND = REGIMES["prepend, frozen"]
# Where a stack of the trunk takes more than the window's gradients and activations.
THIN: Changes = {"stack.batch_size": 1, "seq_len": 16, "trunk.precision": "full", "adapters.stack": {"rank": 2}}
LIKE_OTHERS = (
    *("layerwise", "blockwise, masks redrawn", "fused, trainable", "window 1, stride 2", "window 1, unfreezing"),
    *("insert, frozen", "prepend, frozen", "depth as time", "qlora, window all", "sweeps after growth"),
)
"""Regimes whose trainings are of kinds that others have."""
CASES: dict[str, Changes] = {
    "prepend, nf4": {**PREPEND, "trunk.precision": "nf4"},
    **{name: {**changes, "n_stacks": 3} for name, changes in REGIMES.items() if name not in LIKE_OTHERS},
    "prepend, consistency": {**PREPEND, "growth.consistency": 0.5},
    "prepend, depth as time": {**PREPEND, "growth.consistency": 0.5, "model.time": {"mode": "depth"}},
    "fp16": {"compute.dtype": "fp16"},
    "fp16, prepend": {**PREPEND, "compute.dtype": "fp16"},
    "bf16, not cached": {**REGIMES["blockwise, not cached"], "compute.dtype": "bf16"},
    "window all, unfreezing": {**REGIMES["window all"], "growth.unfreeze": 0.5},
    "qlora, unfreezing": {**REGIMES["qlora, window all"], "growth.unfreeze": 0.5},
    "streamed, thin": {**REGIMES["blockwise, not cached"], **THIN},
    "streamed, thin, fused": {**REGIMES["fused, frozen"], **THIN, "trunk.precision": "nf4"},
    "clm": {"objective": {"type": "clm"}, "model.document_mask": True},
    "resident, thin": {**REGIMES["fused, frozen"], **THIN, "activations.trunk": "resident"},
}


@dataclass
class Taken:
    """What a training has taken."""

    steps: int = 0
    flops: int = 0
    """Of all steps."""
    peak: int = 0
    """The most memory that PyTorch's allocator had given out in the last, without the batch (bytes)."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """What the training takes that is under way. Counting operations keeps tensors longer: those of the last step are
    not counted, but taken for as many as those of the step before."""
    found, step, last = Taken(), loop._step, 0

    def watched(run: Any, batches: Any, optimizer: Any, *others: Any) -> Tensor:
        nonlocal last
        found.steps += 1
        if found.steps < run.steps:
            with Meter() as meter:
                loss: Tensor = step(run, batches, optimizer, *others)
            last = meter.flops
        else:
            there = held(run.module, optimizer)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                loss = step(run, batches, optimizer, *others)
            found.peak = there + most_allocated(profiler)
        found.flops += last
        return loss

    monkeypatch.setattr(loop, "_step", watched)
    return found


def held(window: Any, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that are there all the time: weights, those of a trunk that is resident, and moments."""
    modules: list[nn.Module] = [window]
    if window._trunk is not None and window._trunk._resident:
        modules += [load() for load in (window._trunk._load_embeddings, *window._trunk._load_stacks)]
    states = [state for states in optimizer.state.values() for state in states.values()]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = (tensor.untyped_storage() for tensor in (*tensors, *states))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def most_allocated(profiler: Any) -> int:
    """The most that was allocated at once over what there was when the profiler began (bytes)."""
    live = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_training_takes(
    name: str, taken: Taken, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    if case.get("growth.trunk_strategy") == "qlora":
        case = {**case, "adapters.trunk": {"rank": 4, "dropout": 0.1}}
    params = Params.model_validate(changed(BASE, {**COMMON, **case}))
    lines = []
    with inside(tmp_path):
        run = GrowthRun(params, tmp_path, device=CPU)
        samples = len(open_tokens(run.tokens(), params.seq_len).train)
        planned = {cost.name: cost for cost in costs(params, Corpus(VOCAB, samples), "cpu")}
        for phase in run.phases:
            with Meter() as meter:
                boundary = run.inputs(phase).boundary
            if boundary is not None:
                cost = planned[f"cache_activations_{phase.label}"]
                files = (Path(params.activations.directory) / boundary.facts["key"] / "c").rglob("*")
                assert cost.cache == sum(file.stat().st_size for file in files if file.is_file())
                assert cost.flops == meter.flops
            taken.steps = taken.flops = 0
            run.train(phase, Silent())
            cost = planned[f"train_{phase.name}"]
            assert cost.flops == taken.flops
            assert cost.device == pytest.approx(taken.peak, rel=0.05)
            operations, memory = cost.flops / taken.flops, cost.device / taken.peak
            line = f"{name:<25} {phase.name:<16} plan / measured: operations {operations:.4f}, memory {memory:.4f}"
            lines.append(line)
    record_property(COVERED, "\n".join(lines))


def test_the_plan_of_few_time_steps_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes is made again while others train."""
    few: Changes = {"store_all_time_steps": False, "time_step_cache_size": 2, "shard_mb": 1}
    case: Changes = {"activations": few, "objective.variants": 4, "stack.steps": 80, "n_stacks": 2, "seq_len": 64}
    params = Params.model_validate(changed(BASE, {**COMMON, **case}))
    made, complete = [], Boundaries._complete

    def watched(*arguments: Any) -> None:  # by whichever thread needs it
        with Meter() as meter:
            complete(*arguments)
        made.append(meter.flops)

    monkeypatch.setattr(Boundaries, "_complete", watched)
    with inside(tmp_path):
        run = GrowthRun(params, tmp_path, device=CPU)
        samples = len(open_tokens(run.tokens(), params.seq_len).train)
        planned, plain = (
            {cost.name: cost for cost in costs(params.model_copy(update=update), Corpus(VOCAB, samples), "cpu")}
            for update in ({}, {"activations": ActivationsParams()})
        )
        first, second = run.phases
        run.train(first, Silent())
        run.inputs(second)
        assert sum(made) == planned["cache_activations_1"].flops
        made.clear()
        run.train(second, Silent())
        again = (planned["train_stack_1"].flops or 0) - (plain["train_stack_1"].flops or 0)
        assert sum(made) == again > 0
        assert (planned["cache_activations_1"].cache or 0) < (plain["cache_activations_1"].cache or 0)
