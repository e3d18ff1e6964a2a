"""What can only be seen on a GPU: the pipeline's stages on CUDA, beside the same on the CPU.

Skipped where there is no GPU. The logic has tests of its own on the CPU.
"""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from stackwise.config.compute import Precision
from stackwise.plan.step import cost_of_step
from stackwise.training.optimizer import build_optimizer
from tests.pipeline.inprocess import Changes, Pipeline, project
from tests.pipeline.test_regimes import COMMON, REGIMES
from tests.unit.test_plan import batch_of, large_steps, train_step, window_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

CUDA: Changes = {"compute.device": "cuda"}
SAVING: dict[str, Changes] = {
    "checkpointing": {"compute.activation_checkpointing": True},
    "8-bit moments": {"optimizer.state": "int8"},
    "updates in the backward pass": {"optimizer.in_backward": True, "optimizer.grad_clip": None},
    "micro-batches": {"optimizer.accumulate": 2},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with project(tmp_path_factory.mktemp("cuda")) as found:
        yield found


def losses(pipeline: Pipeline, changes: Changes) -> dict[str, list[float]]:
    """The loss curves of all trainings, and every bound."""
    made = pipeline.run(changes)
    curves = {path: json.loads(Path(path).read_text()) for files in made.values() for path in files if "loss" in path}
    found = {path: [point["loss"] for point in curve] for path, curve in curves.items()}
    bounds = json.loads(Path("metrics/fused.json").read_text())
    return found | {"nelbo": [bounds["nelbo"]["bits_per_byte"]]}


def check(pipeline: Pipeline, changes: Changes, *, rel: float) -> None:
    """The same losses on both devices."""
    check_alike(pipeline, {**COMMON, **changes}, {**COMMON, **changes, **CUDA}, rel=rel)


def check_alike(pipeline: Pipeline, some: Changes, others: Changes, *, rel: float) -> None:
    """The same losses with some parameters as with others."""
    expected, found = losses(pipeline, some), losses(pipeline, others)
    assert expected.keys() == found.keys()
    for path, values in expected.items():
        assert found[path] == pytest.approx(values, rel=rel), path


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime(regime: str, pipeline: Pipeline) -> None:
    adapters = {"adapters.trunk": {"rank": 2}} if "qlora" in str(REGIMES[regime].values()) else {}
    check(pipeline, {**REGIMES[regime], **adapters}, rel=2e-3)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_format(precision: str, dtype: str, pipeline: Pipeline) -> None:
    if dtype == "fp16":
        losses(pipeline, {**COMMON, **CUDA, "trunk.precision": precision, "compute.dtype": dtype})
        return
    adapted = {"growth.trunk_strategy": "qlora", "growth.window": 1, "adapters.trunk": {"rank": 2}}
    check(pipeline, {**adapted, "trunk.precision": precision, "compute.dtype": dtype}, rel=2e-2)


@pytest.mark.parametrize("option", SAVING)
def test_every_way_to_save_memory(option: str, pipeline: Pipeline) -> None:
    check(pipeline, {**SAVING[option], "growth.window": 1}, rel=2e-3)


def test_compiled(pipeline: Pipeline) -> None:
    changes = {**COMMON, **CUDA, "growth.window": 1}
    check_alike(pipeline, changes, {**changes, "compute.compile": True}, rel=2e-3)


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8", "fp8"])
def test_every_format_of_the_cache(activations: str, pipeline: Pipeline) -> None:
    check(pipeline, {"trunk.activations": activations}, rel=5e-3)


@pytest.mark.parametrize("attention", ["gqa", "mla", "kernel", "mlgka"])
def test_every_attention(attention: str, pipeline: Pipeline) -> None:
    latent: dict[str, Any] = {"mla_rkv": 8} if attention.startswith("ml") else {}
    grouped: dict[str, Any] = {"n_kv_heads": 1} if attention in ("gqa", "mlgka") else {}
    check(pipeline, {"model.attention": {"type": attention, "n_heads": 2, **latent, **grouped}}, rel=5e-3)


@pytest.mark.parametrize("regime", ["blockwise", "qlora, window 1", "depth as time"])
def test_the_same_bytes_again(regime: str, pipeline: Pipeline) -> None:
    adapters = {"adapters.trunk": {"rank": 2}} if "qlora" in str(REGIMES[regime].values()) else {}
    changes = {**COMMON, **CUDA, **REGIMES[regime], **adapters, "trunk.precision": "nf4"}
    first = pipeline.run(changes)
    pipeline.forget()
    assert pipeline.run(changes) == first


@pytest.mark.parametrize("name", large_steps())
def test_the_peak_of_memory_is_the_plans(name: str) -> None:
    step = replace(large_steps()[name], device="cuda")
    device = torch.device("cuda")
    gc.collect()  # with what earlier tests have left, cuBLAS's workspaces among it
    torch._C._cuda_clearCublasWorkspaces()
    batch, window = batch_of(step), window_of(step).to(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(t.nbytes for t in (*window.parameters(), *window.buffers()))
    parameters = {name: p for name, p in window.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(parameters, step.optimizer, 1e-3, {})
    if step.optimizer.in_backward:
        pytest.skip("updates of single weights are measured on the CPU")
    for _ in range(2):
        train_step(window, step, batch, optimizer.step)
    assert cost_of_step(step).peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
