"""The plan's arithmetic against the real modules and real training steps."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from stackwise.config.compute import Precision
from stackwise.config.growth import AdaptersParams, GrowthParams, LoRAParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, PretrainedParams, TimeParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params, load
from stackwise.config.training import OptimizerParams
from stackwise.errors import UserError
from stackwise.growth.phases import phases
from stackwise.growth.window import Batch, Window
from stackwise.model.context import Context
from stackwise.model.embeddings import Embeddings
from stackwise.model.frozen import FrozenLinear, FrozenRandom
from stackwise.model.rack import Head, RackShape
from stackwise.model.stack import Stack
from stackwise.objectives.masks import draw_masks
from stackwise.objectives.targets import Targets
from stackwise.plan.parts import Builder, LoRA, Sizes, StackPlan, Vocabulary, held
from stackwise.plan.phase import step_of_phase
from stackwise.plan.rates import ACCELERATORS, rate_of
from stackwise.plan.rows import rows_of
from stackwise.plan.step import Cost, Step, cost_of_pass, cost_of_step, state_bytes
from stackwise.plan.tape import Meter
from stackwise.plan.tuning import branch_tuning
from stackwise.plan.weights import Part, embeddings_weights, head_weights, lora_weights, stack_weights
from stackwise.precision import formats
from stackwise.precision.dtypes import DTYPES, autocast
from stackwise.training.optimizer import build_optimizer, updates_in_backward

CPU = torch.device("cpu")
WIDTH = 32
ATTENTION = {
    "standard": AttentionParams(qk_norm=True),
    "gqa": AttentionParams(type="gqa", n_kv_heads=2, head_dim=6),
    "mla": AttentionParams(type="mla", mla_rkv=12),
    "mla-queries": AttentionParams(type="mla", mla_rkv=12, mla_rq=20, mla_v_dim=6, mla_nope_dim=10, mla_rope_dim=4),
    "kernel": AttentionParams(type="kernel", n_kv_heads=2, features=10, qk_norm=True),
    "kernel-waves": AttentionParams(type="kernel", kernel="gaussian"),
    "kernel-linear": AttentionParams(type="kernel", kernel="linear", n_kv_heads=1),
    "mlgka": AttentionParams(type="mlgka", n_kv_heads=2, mla_rkv=12, mla_rq=10),
    "dropout": AttentionParams(type="gqa", n_kv_heads=1, dropout=0.1),
}
MLP = {
    "swiglu": MLPParams(hidden=40),
    "frozen-up": MLPParams(hidden=40, frozen_up=True),
    "moe": MLPParams(type="moe", hidden=24, n_experts=3, top_k=2, n_shared=1),
    "moe-frozen-up": MLPParams(type="moe", hidden=24, n_experts=4, top_k=1, frozen_up=True),
}
TIME = {
    "none": TimeParams(),
    "input": TimeParams(mode="input", width=10),
    "learned": TimeParams(mode="input", width=6, embedding="learned", bins=5),
}


def model_of(attention: str = "standard", mlp: str = "swiglu", time: str = "none", **others: Any) -> ModelParams:
    return ModelParams(d_model=WIDTH, attention=ATTENTION[attention], mlp=MLP[mlp], time=TIME[time], **others)


# Weights.

Shapes = Counter[tuple[str, tuple[int, ...]]]


def found_in(module: nn.Module) -> tuple[Shapes, int]:
    """Names (experts by one name) and shapes of a module's matrices, and the numbers of its vectors."""
    shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in module.named_parameters()}
    for name, part in module.named_modules():
        if isinstance(part, FrozenLinear):
            shapes[name] = tuple(part.value.shape)
    names = {name: re.sub(r"\.(experts|shared)\.\d+\.", r".\1.", name) for name in shapes}
    matrices: Shapes = Counter((names[name], shape) for name, shape in shapes.items() if len(shape) == 2)
    return matrices, sum(shape[0] for shape in shapes.values() if len(shape) == 1)


def found_in_part(part: Part) -> tuple[Shapes, int]:
    matrices: Shapes = Counter()
    for matrix in part.matrices:
        matrices[matrix.name, (matrix.rows, matrix.columns)] += matrix.count
    return matrices, part.vectors


@pytest.mark.parametrize(
    ("attention", "mlp", "time"),
    [
        *((attention, "swiglu", "none") for attention in ATTENTION),
        *(("standard", mlp, "none") for mlp in MLP),
        *(("gqa", "moe", time) for time in TIME),
    ],
)
def test_a_stack_has_the_weights_of_the_plan(attention: str, mlp: str, time: str) -> None:
    model = model_of(attention, mlp, time)
    stack, part = Stack(model, 2), stack_weights(model, 2)
    assert found_in_part(part) == found_in(stack)
    assert part.learnable == sum(p.numel() for p in stack.parameters())
    random = [m for m in stack.modules() if isinstance(m, FrozenRandom)]
    assert (part.drawn, part.seeds) == (sum(m.value.numel() for m in random), len(random))
    assert part.stored_bytes("full") == sum(t.nbytes for t in stack.state_dict().values())


@pytest.mark.parametrize(("tied", "adapter_hidden"), [(False, None), (True, None), (False, 24)])
def test_the_ends_have_the_weights_of_the_plan(tied: bool, adapter_hidden: int | None) -> None:
    source = PretrainedParams(source="x", adapter_hidden=adapter_hidden) if adapter_hidden else PretrainedParams()
    model = model_of(embeddings=source, head=source, tie_embeddings=tied)
    widths = (WIDTH, WIDTH) if tied else (40, 48)
    embeddings = Embeddings(50, WIDTH, width=widths[0], adapter_hidden=adapter_hidden)
    head = Head(model, 50, width=widths[1], tied_to=embeddings if tied else None)
    for part, module in (
        (embeddings_weights(model, 50, widths[0]), embeddings),
        (head_weights(model, 50, widths[1]), head),
    ):
        assert found_in_part(part) == found_in(module)


@pytest.mark.parametrize("precision", ["full", "half", "bfloat16", "fp8", "nvfp4"])
@pytest.mark.parametrize("time", TIME)
def test_a_quantized_stack_takes_the_memory_of_the_plan(precision: Precision, time: str) -> None:
    model = model_of("gqa", "moe", time)
    stack = Stack(model, 1)
    formats.quantize(stack, precision)
    taken = formats.memory(stack)
    assert stack_weights(model, 1).stored_bytes(precision) == taken
    meter = Meter()
    parts = Builder(meter, "cpu").stack(StackPlan(model, 1, precision=precision), "fp32")
    assert meter.live == {"frozen": taken}
    del parts
    assert not meter.live["frozen"]


def test_a_trunk_is_rounded_to_what_computes_unless_that_has_more_bits() -> None:
    assert [held(stored, "bf16") for stored in ("full", "half", "bfloat16")] == ["bfloat16"] * 3
    assert [held(stored, "fp32") for stored in ("full", "half", "bfloat16")] == ["full", "half", "bfloat16"]
    assert held("full", "fp16") == "half"
    assert held("nf4", "bf16") == "nf4"


def test_adapters_have_the_weights_of_the_plan() -> None:
    from stackwise.adapters.lora import adapt, adapter_parameters

    for attention, mlp, targets in (("mla-queries", "moe", None), ("gqa", "frozen-up", ["q_proj", "down_proj"])):
        stack = Stack(model_of(attention, mlp, "input"), 1)
        part = lora_weights(stack_weights(model_of(attention, mlp, "input"), 1), 5, targets)
        adapt(stack, "trunk", LoRAParams(rank=5, target_modules=targets), k=0, seed=0)
        shapes = Counter(tuple(p.shape) for p in adapter_parameters(stack, "trunk").values())
        planned: Counter[tuple[int, ...]] = Counter()
        for matrix in part.matrices:
            planned[matrix.rows, matrix.columns] += matrix.count
        assert planned == shapes


# Steps.


def step_of(model: ModelParams, *window: StackPlan, **others: Any) -> Step:
    """A step of a small window."""
    width = model.d_model
    defaults: dict[str, Any] = {
        "vocabulary": Vocabulary(model, 50, width, width),
        "sizes": Sizes(batch=3, seq=70, rows=40),
        "optimizer": OptimizerParams(),
        "compute": "fp32",
        "from_boundary": True,
    }
    return Step(window or (StackPlan(model, 1, learns=True),), **defaults | others)


def window_of(step: Step) -> Window:
    """The real thing."""
    ends = step.vocabulary
    shape = RackShape.of(ends.model, [1], ends.size, embedding_width=ends.embedding_width, head_width=ends.head_width)
    stacks = []
    for plan in step.window:
        stack = Stack(plan.model, plan.blocks)
        if not plan.learns:
            stack.requires_grad_(False)
        if plan.precision is not None:
            formats.quantize(stack, held(plan.precision, step.compute))
            for part in stack.modules():
                if isinstance(part, FrozenLinear):
                    part.to(DTYPES[step.compute])
        for lora in plan.adapters:
            from stackwise.adapters.lora import adapt, train_only

            params = LoRAParams(
                rank=lora.rank,
                dropout=0.1 if lora.dropout else 0.0,
                target_modules=None if lora.targets is None else sorted(lora.targets),
            )
            adapt(stack, "trunk", params, k=0, seed=0)
            train_only(stack, ["trunk"] if lora.learns else [])
        stacks.append(stack)
    embeddings = None
    if ends.model.tie_embeddings or step.embedding_term or not step.from_boundary:
        embeddings = shape.build_embeddings()
        if not step.embeddings_learn:
            embeddings.requires_grad_(False)
    head = shape.build_head(embeddings)
    if not step.head_learns:
        head.requires_grad_(False)
    window = Window(stacks, head, embeddings, checkpointing=step.checkpointing)
    for parameter in window.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter.data, std=0.02)
    return window.train()


def batch_of(step: Step) -> Batch:
    sizes, ends = step.sizes, step.vocabulary
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(ends.size, (sizes.batch, sizes.seq), generator=generator)
    if step.from_boundary:
        inputs = torch.randn(sizes.batch, sizes.seq, ends.model.d_model, generator=generator).bfloat16()
    targets = Targets(
        torch.randperm(sizes.tokens, generator=generator)[: sizes.rows],
        torch.randint(ends.size, (sizes.rows,), generator=generator),
        torch.ones(sizes.rows),
        sizes.tokens,
        float(step.embedding_term),
    )
    segments = (torch.arange(sizes.seq) // 30).expand(sizes.batch, -1) if sizes.segments else None
    return Batch(inputs, targets, torch.rand(sizes.batch, generator=generator), segments)


def train_step(window: Window, step: Step, batch: Batch, update: Callable[[], object] = lambda: None) -> None:
    """What the training loop does in a step."""
    device = torch.device(step.device)
    for _ in range(step.optimizer.accumulate):
        with autocast(device, step.compute):
            loss = window.loss(batch, device=device, causal=step.sizes.causal)
        loss.backward()
        del loss
    update()
    window.zero_grad(set_to_none=True)


def _attention(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


FUSED = {  # which the counter knows of GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted(step: Step) -> tuple[int, int]:
    """Operations of a real step's forward passes, and of the whole of it."""
    window, batch = window_of(step), batch_of(step)
    context = Context(step.sizes.causal, batch.segments, batch.times)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED) as forward:
        x = window(batch.inputs, context)
        window.head(x.flatten(0, 1)[: step.sizes.rows])
    with FlopCounterMode(display=False, custom_mapping=FUSED) as both:
        train_step(window, step, batch)
    return forward.get_total_flops() * step.optimizer.accumulate, both.get_total_flops()


def check_flops(step: Step) -> None:
    flops = cost_of_step(step).flops
    assert (flops.forward, flops.total) == counted(step)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_operations_of_every_attention(attention: str, segments: bool, causal: bool) -> None:
    sizes = Sizes(batch=2, seq=70, rows=33, causal=causal, segments=segments)
    check_flops(step_of(model_of(attention), sizes=sizes))


@pytest.mark.parametrize(("mlp", "time"), [*((mlp, "none") for mlp in MLP), *(("moe", time) for time in TIME)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_every_network_and_time(mlp: str, time: str, checkpointing: bool) -> None:
    model = model_of(mlp=mlp, time=time)
    window = StackPlan(model, 1), StackPlan(model, 2, learns=True), StackPlan(model, 1)
    check_flops(step_of(model, *window, checkpointing=checkpointing))


def windows(model: ModelParams) -> dict[str, Step]:
    """Windows of every kind."""
    new, trunk = StackPlan(model, 1, learns=True), StackPlan(model, 2, precision="fp8")
    adapted = replace(trunk, precision="bfloat16", adapters=(LoRA(3, dropout=True),))
    source = PretrainedParams(source="x", train=False, adapter_hidden=24)
    taken = model.model_copy(update={"embeddings": source, "head": source})
    tokens: dict[str, Any] = {"from_boundary": False, "embeddings_learn": True}
    return {
        "two that learn": step_of(model, new, new, **tokens),
        "frozen below": step_of(model, trunk, new),
        "frozen above": step_of(model, new, trunk, from_boundary=False),
        "adapters below": step_of(model, adapted, new),
        "adapters above, checkpointing": step_of(model, new, adapted, checkpointing=True),
        "adapters alone": step_of(model, StackPlan(model, 1, adapters=(LoRA(2, frozenset({"v_proj"})),))),
        "adapters below a frozen head": step_of(model, adapted, from_boundary=False, head_learns=False),
        "adapters of one network": step_of(model, StackPlan(model, 2, adapters=(LoRA(2, frozenset({"down_proj"})),))),
        "tied": step_of(model.model_copy(update={"tie_embeddings": True}), new, **tokens),
        "tied to frozen embeddings": step_of(model.model_copy(update={"tie_embeddings": True}), new),
        "a vocabulary of another model": step_of(taken, new, vocabulary=Vocabulary(taken, 60, 40, 48), **tokens),
        "micro-batches": step_of(model, new, optimizer=OptimizerParams(accumulate=3)),
        "a loss in embedding space": step_of(model, new, embedding_term=True),
    }


@pytest.mark.parametrize("name", windows(model_of()))
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_operations_of_every_window(name: str, compute: Any) -> None:
    check_flops(replace(windows(model_of())[name], compute=compute))


def test_a_pass_without_gradients_costs_its_products() -> None:
    for attention in ("gqa", "mlgka"):
        model, sizes = model_of(attention), Sizes(batch=2, seq=20, rows=0, causal=True)
        stack = Stack(model, 2).eval()
        with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            stack(torch.randn(2, 20, WIDTH), Context(causal=True))
        cost = cost_of_pass(StackPlan(model, 2), sizes, "fp32")
        assert cost.flops.forward == cost.flops.total == counter.get_total_flops()


def test_frozen_stacks_below_cost_only_their_forward_pass() -> None:
    model = model_of()
    trunk = StackPlan(model, 2, precision="bfloat16")
    alone = cost_of_step(step_of(model, from_boundary=False)).flops
    with_trunk = cost_of_step(step_of(model, from_boundary=False, below=(trunk, trunk))).flops
    one = cost_of_pass(trunk, Sizes(batch=3, seq=70, rows=40), "fp32").flops.forward
    assert with_trunk.forward == alone.forward + 2 * one
    assert (with_trunk.to_inputs, with_trunk.to_weights) == (alone.to_inputs, alone.to_weights)


# Memory.


def measured_peak(step: Step) -> int:
    """The most that PyTorch's allocator has given out in real steps, without the batch (bytes)."""
    batch = batch_of(step)

    def run() -> None:
        window = window_of(step)
        with record_function("built"):
            pass
        parameters = {name: p for name, p in window.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(parameters, step.optimizer, 1e-3, {})
        hooks: AbstractContextManager[None] = nullcontext()
        if step.optimizer.in_backward:
            hooks = updates_in_backward(parameters.values(), optimizer)
        with hooks:
            for _ in range(2):
                train_step(window, step, batch, lambda: step.optimizer.in_backward or optimizer.step())

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == "built")
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live) if event.start_ns() >= began else 0
    return peak


def large(**others: Any) -> ModelParams:
    """Wide enough for tensors to dominate."""
    defaults: dict[str, Any] = {"attention": AttentionParams(n_heads=4), "mlp": MLPParams(hidden=512)}
    return ModelParams(d_model=256, **defaults | others)


def large_steps() -> dict[str, Step]:
    """Steps of which different things make the peak."""
    sizes = Sizes(batch=6, seq=160, rows=500)
    model = large()
    new = StackPlan(model, 2, learns=True)
    sparse = large(mlp=MLPParams(type="moe", hidden=256), attention=AttentionParams(type="mla", n_heads=4, mla_rkv=64))
    kernel = large(attention=AttentionParams(type="kernel", n_heads=4, n_kv_heads=2, qk_norm=True))
    wide = Vocabulary(model, 12_000, 256, 256)
    in_backward = OptimizerParams(in_backward=True, grad_clip=None)
    return {
        "activations": step_of(model, new, sizes=sizes),
        "activations under autocast": step_of(model, new, sizes=sizes, compute="bf16"),
        "kernel": step_of(kernel, sizes=replace(sizes, causal=True), compute="bf16"),
        "latents and experts": step_of(sparse, sizes=replace(sizes, segments=True)),
        "checkpointing": step_of(model, replace(new, blocks=3), sizes=sizes, checkpointing=True),
        "checkpointing under autocast": step_of(
            model,
            replace(new, blocks=3),
            sizes=Sizes(2, 64, 60),
            vocabulary=replace(wide, size=4000),
            compute="bf16",
            checkpointing=True,
        ),
        "weights": step_of(model, replace(new, blocks=4), sizes=Sizes(1, 32, 16)),
        "updates in the backward pass": step_of(
            model, replace(new, blocks=4), sizes=Sizes(1, 32, 16), optimizer=in_backward
        ),
        "micro-batches": step_of(model, new, sizes=sizes, optimizer=OptimizerParams(accumulate=2)),
        "vocabulary": step_of(model, new, sizes=sizes, vocabulary=wide, compute="bf16", from_boundary=False),
        "frozen above": step_of(
            model,
            replace(new, blocks=1),
            StackPlan(model, 1, precision="nvfp4"),
            StackPlan(model, 2),
            sizes=sizes,
            from_boundary=False,
            embeddings_learn=True,
        ),
        "adapters": step_of(
            model, StackPlan(model, 2, precision="fp8", adapters=(LoRA(8),)), sizes=sizes, compute="bf16"
        ),
        "modulated": step_of(large(time=TimeParams(mode="input")), sizes=sizes),
    }


@pytest.mark.parametrize("name", large_steps())
def test_the_peak_of_memory(name: str) -> None:
    step = large_steps()[name]
    assert cost_of_step(step).peak == pytest.approx(measured_peak(step), rel=0.02)


def test_memory_is_told_apart() -> None:
    model = model_of()
    part, head = stack_weights(model, 2), head_weights(model, 50, WIDTH)
    trained = part.learnable + head.learnable
    memory = cost_of_step(
        step_of(model, StackPlan(model, 2, learns=True), StackPlan(model, 1, precision="half"))
    ).memory
    assert memory["weights"] == 4 * trained
    assert memory["optimizer"] == 8 * trained
    assert memory["frozen"] == stack_weights(model, 1).stored_bytes("half")


def test_a_trunk_that_is_streamed_is_in_memory_one_stack_at_a_time() -> None:
    model = model_of()
    trunk = StackPlan(model, 8, precision="full")
    one = stack_weights(model, 8).stored_bytes("full")
    step = step_of(model, sizes=Sizes(1, 2, 1), from_boundary=False, below=(trunk,) * 5)
    streamed, resident = (cost_of_step(replace(step, below_stays=stays)) for stays in (False, True))
    assert streamed.memory["frozen"] == one
    assert resident.memory["frozen"] == 5 * one + 4 * embeddings_weights(model, 50, WIDTH).learnable
    assert streamed.flops == resident.flops


def test_moments_of_8_bits_have_a_scale_for_256() -> None:
    optimizer = OptimizerParams(state="int8")
    assert state_bytes(4095, optimizer) == 8 * 4095
    assert state_bytes(4097, optimizer) == 2 * (4097 + 4 * 17)
    assert state_bytes(4097, OptimizerParams()) == 8 * 4097


def test_batches_are_kept_ready_on_the_host() -> None:
    model = model_of()
    boundary, tokens = (
        cost_of_step(step_of(model, from_boundary=given, prefetch=2)).batches for given in (True, False)
    )
    assert boundary - tokens == 3 * 2 * 3 * 70 * WIDTH


# Phases of growth.


def plan_of(params: Params) -> list[Cost]:
    """The cost of a step of each phase."""
    model = params.model
    vocabulary = Vocabulary(model, 300, model.d_model, model.d_model)
    lora = params.adapters.stack is not None
    return [
        cost_of_step(step_of_phase(params, phase, vocabulary, rows=500, device="cpu"))
        for phase in phases(params.growth, params.n_stacks, lora=lora)
    ]


@pytest.fixture(scope="module")
def params() -> Params:
    return load("params.yaml").model_copy(update={"model": large(), "seq_len": 64})


def test_each_stack_on_cached_activations_costs_the_same(params: Params) -> None:
    first, second, *others = plan_of(params)
    assert all(cost == second for cost in others)
    assert second.memory["weights"] < first.memory["weights"]  # which has the embeddings
    assert not second.memory.get("frozen")


def test_a_frozen_trunk_that_is_not_cached_costs_more_forwards_alone(params: Params) -> None:
    fused = params.model_copy(update={"growth": GrowthParams(mode="fused")})
    _, second, third, fourth = plan_of(fused)
    assert third.flops.forward - second.flops.forward == fourth.flops.forward - third.flops.forward > 0
    assert (second.flops.to_inputs, second.flops.to_weights) == (fourth.flops.to_inputs, fourth.flops.to_weights)
    assert second.peak == fourth.peak  # one stack of the trunk after another


def test_gradients_flow_through_what_lies_above_a_prepended_stack(params: Params) -> None:
    _, second, third, _ = plan_of(params.model_copy(update={"growth": GrowthParams(building_mode="prepend")}))
    assert second.flops.to_weights == third.flops.to_weights
    assert second.flops.to_inputs < third.flops.to_inputs
    assert second.peak < third.peak


def test_adapters_learn_in_place_of_weights(params: Params) -> None:
    growth, all_learn = (GrowthParams(window=1, trunk_strategy=learns) for learns in ("qlora", "trainable"))
    adapters = AdaptersParams(trunk=LoRAParams(rank=4))
    qlora = plan_of(params.model_copy(update={"growth": growth, "adapters": adapters}))[-1]
    trainable = plan_of(params.model_copy(update={"growth": all_learn}))[-1]
    assert qlora.memory["optimizer"] < trainable.memory["optimizer"]
    assert qlora.flops.to_weights < trainable.flops.to_weights
    alone = plan_of(params.model_copy(update={"adapters": AdaptersParams(stack=LoRAParams(rank=4))}))[-1]
    model = params.stack_model(3)
    learns = lora_weights(stack_weights(model, params.stack.blocks), 4, None), head_weights(model, 300, model.d_model)
    assert alone.memory["optimizer"] == 8 * sum(part.learnable for part in learns)


def test_all_stacks_from_the_start_are_one_phase(params: Params) -> None:
    (whole,) = plan_of(params.model_copy(update={"growth": GrowthParams(strategy="end_to_end")}))
    *_, last = plan_of(params)
    assert whole.memory["weights"] > 3 * last.memory["weights"]
    sweeps = GrowthParams(strategy="end_to_end", end_to_end_scope="stackwise", sweeps=2)
    assert len(plan_of(params.model_copy(update={"growth": sweeps}))) == 2 * params.n_stacks


# Rows and rates.


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveParams(),
        ObjectiveParams(distribution="cosine", count="exact", mask_min=0.3, mask_max=0.7),
        ObjectiveParams(num_time_steps=5, time_step_fractions=[0.1, 0.1, 0.2, 0.9, 1.0]),
    ],
    ids=["uniform", "cosine", "steps"],
)
def test_rows_are_as_many_as_masks_hide(objective: ObjectiveParams) -> None:
    batch, seq, batches = 8, 64, 250
    samples = np.arange(batch * batches)
    _, masks = draw_masks(objective, seed=0, samples=samples, variants=np.zeros_like(samples), seq=seq)
    hidden = masks.reshape(batches, -1).sum(axis=1)
    rows = rows_of(objective, batch=batch, seq=seq)
    assert rows.mean == pytest.approx(hidden.mean(), rel=0.03)
    assert hidden.max() <= rows.most < 1.35 * hidden.max()


def test_rows_that_are_known() -> None:
    assert rows_of(ObjectiveParams(type="clm"), batch=4, seq=10).most == 36
    assert rows_of(ObjectiveParams(type="custom"), batch=4, seq=10).most == 40
    assert rows_of(ObjectiveParams(count="exact"), batch=4, seq=10, fraction=0.5).most == 20
    rising = ObjectiveParams(schedule="linear", schedule_over="training", mask_min=0.2, mask_max=0.8, count="exact")
    rows = rows_of(rising, batch=4, seq=100)
    assert rows.mean == pytest.approx(200)
    assert rows.most == 320
    apart, shared = (rows_of(ObjectiveParams(), batch=16, seq=64, shared=s).most for s in (False, True))
    assert apart < shared


def test_a_rate_is_a_share_of_the_peak() -> None:
    assert rate_of("a100-80", 0.5) == ACCELERATORS["a100-80"].flops / 2
    with pytest.raises(UserError, match=r"--device = a100: not known; expected one of cpu, .*a100-40"):
        rate_of("a100")
    with pytest.raises(UserError, match=r"--utilisation = 40: expected a share"):
        rate_of("h100", 40)


def test_the_plan_imports_no_torch() -> None:
    modules = "attention, operations, parts, passes, phase, rates, rows, step, tape, weights"
    code = (
        f"import sys\nfrom stackwise.plan import {modules}\nassert not {{'torch', 'zarr', 'peft'}} & {{*sys.modules}}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- fine-tuning


BRANCHES = {
    "full": {"objective": "clm", "batch_size": 4},
    "lora": {"objective": "clm", "batch_size": 4, "method": "lora", "lora": {"rank": 3}},
    "qlora": {"objective": "clm", "batch_size": 4, "method": "qlora", "lora": {"rank": 3}, "precision": "fp8"},
    "labels": {
        "objective": "classification",
        "batch_size": 4,
        "data": {"format": "sequence_labels", "files": ["x.jsonl"], "labels": ["a", "b", "c"]},
    },
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_learns_and_holds_what_the_plan_says(name: str, params: Params, tmp_path: Any) -> None:
    from stackwise.finetuning.branch import load_base
    from stackwise.finetuning.classifier import Classes, Classifier
    from stackwise.growth.racks import save_rack
    from stackwise.model.rack import Rack

    tree = params.model_dump(exclude_unset=True) | {"fine_tune": BRANCHES}
    planned = Params.model_validate(tree)
    width = planned.model.d_model
    tuning = branch_tuning(planned, name, Vocabulary(planned.model, 50, width, width), "cpu")
    blocks = [planned.stack_params(k).blocks for k in range(planned.n_stacks)]
    rack = Rack(RackShape.of(planned.model, blocks, 50))
    for parameter in rack.parameters():
        nn.init.normal_(parameter, std=0.02)
    for directory in ("tokenizer", "rack"):
        (tmp_path / directory).mkdir()
    save_rack(tmp_path / "rack", rack, tmp_path / "tokenizer")
    model: Any = load_base(tmp_path / "rack", planned.fine_tune[name], name=name, seed=0, device=CPU)
    if name == "labels":
        model = Classifier.of(model, Classes(("a", "b", "c"), pooled=True))
    assert tuning.learns == sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = tuning.learns if name in ("lora", "qlora") else 0
    whole = sum(p.numel() for p in rack.parameters())
    assert sum(tuning.frozen.values()) == (whole if adapters else 0)
    assert {precision for precision, n in tuning.frozen.items() if n} == {
        "full": set(), "labels": set(), "lora": {"full"}, "qlora": {"full", "fp8"},
    }[name]  # fmt: skip
    full = branch_tuning(planned, "full", Vocabulary(planned.model, 50, width, width), "cpu")
    if adapters:
        assert cost_of_step(tuning.step).memory["optimizer"] < cost_of_step(full.step).memory["optimizer"] / 3
    if name == "qlora":
        lora = branch_tuning(planned, "lora", Vocabulary(planned.model, 50, width, width), "cpu")
        assert cost_of_step(tuning.step).memory["frozen"] < cost_of_step(lora.step).memory["frozen"]
