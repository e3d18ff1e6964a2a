"""The formats of a trunk: what they make of a matrix, sizes, gradients, files, and which machine has which."""

import copy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stackwise.artifacts import manifest
from stackwise.config.compute import Precision
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, TimeParams
from stackwise.errors import UserError
from stackwise.growth.init import initialize
from stackwise.growth.stacks import EMBEDDINGS, KIND, TrainedStack, Training, stack_file
from stackwise.model.context import Context
from stackwise.model.frozen import FrozenLinear
from stackwise.model.rack import RackShape
from stackwise.model.stack import Stack
from stackwise.model.time import Modulation
from stackwise.precision import formats
from stackwise.precision.dtypes import DTYPES, autocast
from stackwise.precision.fp8 import E4M3
from stackwise.precision.nvfp4 import e2m1_codes
from stackwise.precision.sizes import at_least_16_bits, matrix_bytes, matrix_precision
from stackwise.precision.stored import Empty, StoredLinear
from stackwise.precision.trunk import TrunkStack, quantize_stack
from stackwise.variants import ATTENTION, MLP

CPU = torch.device("cpu")
D_MODEL, VOCAB, SEQ = 32, 19, 10
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
STORED: tuple[Precision, ...] = PRECISIONS[1:]
every_format = pytest.mark.parametrize("precision", STORED)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {"attention": AttentionParams(n_heads=4)},
    "gqa": {"attention": AttentionParams(type="gqa", n_heads=4, n_kv_heads=2)},
    "mla": {"attention": AttentionParams(type="mla", n_heads=4, mla_rq=10, mla_rkv=12)},
    "kernel": {"attention": AttentionParams(type="kernel", n_heads=4)},
    "mlgka": {"attention": AttentionParams(type="mlgka", n_heads=4, n_kv_heads=2, mla_rkv=12)},
    "moe": {"mlp": MLPParams(type="moe", hidden=24, n_experts=3, n_shared=1)},
    "frozen-up": {"mlp": MLPParams(hidden=48, frozen_up=True)},
    "timed": {"time": TimeParams(mode="input", width=16, embedding="learned", bins=4)},
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_kind_of_part = pytest.mark.parametrize("architecture", ["mlgka", "moe", "frozen-up", "timed"])


def model_of(architecture: str = "standard") -> ModelParams:
    params = {"d_model": D_MODEL, "mlp": MLPParams(hidden=48), **ARCHITECTURES[architecture]}
    return ModelParams(**{"attention": AttentionParams(n_heads=4), **params})


def build(model: ModelParams | str = "standard", precision: Precision = "full") -> Stack:
    """Two blocks."""
    stack = Stack(model_of(model) if isinstance(model, str) else model, 2)
    initialize(stack, name="stacks.0", seed=0)
    with torch.no_grad():
        for block in stack.blocks:
            if isinstance(block.modulation, Modulation):  # they begin at zero
                block.modulation.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    formats.quantize(stack, precision)
    return stack


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: Tensor, precision: Precision) -> StoredLinear:
    """A matrix in a format."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    holder = nn.Sequential(linear)
    formats.quantize(holder, precision)
    assert isinstance(holder[0], StoredLinear)
    return holder[0]


def run(stack: nn.Module, x: Tensor) -> Tensor:
    times = torch.linspace(0.1, 0.9, len(x))
    return stack(x, Context(causal=True, times=times))


def linears(stack: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in stack.named_modules() if isinstance(part, nn.Linear)}


# --- what a format makes of a matrix


@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [
        ("half", 0.0022, 0.0029),  # products are rounded to bf16, too
        ("bfloat16", 0.0022, 0.0029),
        ("int8", 0.0039, 0.015),
        ("fp8", 0.017, 0.026),
        ("nf4", 0.057, 0.109),
        ("fp4", 0.073, 0.163),
        ("nvfp4", 0.063, 0.093),
    ],
)
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_errors_of_outputs_are_those_measured(precision: Precision, low: float, high: float, tails: str) -> None:
    """From the weights of a trained model to ones with heavy tails."""
    weight, x = normal(512, 256), normal(64, 256, seed=1)
    if tails == "heavy":  # Student's t with 4 degrees of freedom
        weight /= normal(512, 256, 4, seed=2).square().mean(-1).sqrt()
    exact = x @ weight.T
    with autocast(CPU, "bf16"):
        found = stored(weight, precision)(x)
    assert found.dtype == torch.bfloat16
    assert 0.9 * low < float((found - exact).norm() / exact.norm()) < 1.1 * high


@every_format
def test_a_format_rounds_what_it_has_made_no_further(precision: Precision) -> None:
    once = stored(normal(24, 80), precision).matrix(torch.float32)
    twice = stored(once, precision).matrix(torch.float32)
    # The scales of scales of nf4 and fp4 move a little.
    torch.testing.assert_close(twice, once, rtol=0.01 if precision in ("nf4", "fp4") else 1e-3, atol=1e-6)


@every_format
@pytest.mark.parametrize("shape", [(50, 38), (96, 100), (7, 5), (33, 1), (1, 67), (3, 129)])
def test_odd_shapes_work(precision: Precision, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no block, group or byte divides; without bitsandbytes' way out for them, which calls a compiler."""
    monkeypatch.setattr("bitsandbytes.backends.default.ops._dequantize_4bit_compute", None)
    weight = normal(*shape)
    part = stored(weight, precision)
    assert part.matrix(torch.float32).shape == shape
    assert float((part.matrix(torch.float32) - weight).norm() / weight.norm()) < 0.2
    x = normal(4, shape[1]).requires_grad_()
    for training in (True, False):
        part.train(training)
        (grad,) = torch.autograd.grad(part(x).sum(), x)
        assert grad.abs().sum() > 0


@every_format
def test_zeros_are_exact_and_break_nothing(precision: Precision) -> None:
    """An output projection begins at zero; a row or a block of zeros has no scale."""
    assert not stored(torch.zeros(8, 64), precision).matrix(torch.float32).any()
    weight = normal(8, 128)
    weight[2], weight[:, 64:] = 0, 0
    found = stored(weight, precision).matrix(torch.float32)
    assert found.isfinite().all()
    assert torch.equal(found == 0, (weight == 0) | (found == 0))
    assert (found[weight == 0] == 0).all()


@every_format
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3])
def test_scales_follow_the_size_of_the_weights(precision: Precision, size: float) -> None:
    if precision in ("half", "int8"):
        size = max(size, 1e-3)  # there are no 16-bit floats of much less
    once, much = (stored(s * normal(16, 64), precision).matrix(torch.float32).double() for s in (1.0, size))
    assert float((much - size * once).norm() / (size * once).norm()) < 0.03


def test_e2m1_is_the_nearest_number_and_of_two_the_even() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = torch.cat((torch.linspace(0, 8, 6401), values, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])))
    distances = (x[:, None] - values).abs()
    nearest = distances == distances.amin(dim=1, keepdim=True)
    even = torch.arange(8) % 2 == 0
    expected = torch.where(nearest.sum(1) == 2, (nearest & even).int().argmax(1), nearest.int().argmax(1))
    assert torch.equal(e2m1_codes(x).long(), expected)
    assert torch.equal(e2m1_codes(-x).long(), expected + 8)


def test_fp8_is_the_cast_of_each_row_that_fills_the_range() -> None:
    weight = normal(6, 40) * torch.tensor([1e-6, 1.0, 3.0, 1e4, 0.5, 2.0])[:, None]
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    expected = (weight / scale).clamp(-448, 448).to(E4M3).float() * scale
    assert torch.equal(stored(weight, "fp8").matrix(torch.float32), expected)


def test_nvfp4_decodes_by_its_two_scales() -> None:
    part = stored(normal(4, 40), "nvfp4")
    codes, group_scales, scale = part.stored()
    assert codes.shape == (4, 24)
    assert group_scales.shape == (4, 3)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    scales = group_scales.view(E4M3).float() * scale
    assert scales.amax() == 448 * scale  # of the largest number of all
    by_hand = torch.stack((numbers[codes.long() >> 4], numbers[codes.long() & 15]), dim=-1).view(4, 3, 16)
    assert torch.equal(part.matrix(torch.float32), (by_hand * scales[..., None]).view(4, -1)[:, :40])


def test_nvfp4_keeps_groups_far_below_the_largest() -> None:
    """Their scale would be rounded to zero."""
    weight = torch.cat((torch.ones(1, 16), torch.full((1, 16), 1e-6)), dim=1)
    torch.testing.assert_close(stored(weight, "nvfp4").matrix(torch.float32), weight, rtol=0.1, atol=0)


@pytest.mark.parametrize("precision", ["nf4", "fp4"])
def test_four_bits_decode_by_their_nested_scales(precision: Precision) -> None:
    part = stored(normal(60, 70), precision)
    codes, scales, values, nested_scales, nested_values, mean = part.stored()
    scales = nested_values[scales.long()] * nested_scales.repeat_interleave(256)[: len(scales)] + mean
    numbers = values[torch.stack((codes.long() >> 4, codes.long() & 15), dim=-1).flatten()]
    expected = (numbers * scales.repeat_interleave(64)[: len(numbers)])[: 60 * 70].view(60, 70)
    assert torch.equal(part.matrix(torch.float32), expected)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoded_matrix_is_rounded_once(precision: Precision, dtype: torch.dtype) -> None:
    part = stored(normal(40, 70), precision)
    assert torch.equal(part.matrix(dtype), part.matrix(torch.float32).to(dtype))


@every_format
@pytest.mark.parametrize("shape", [(200, 301), (16, 1024), (3, 20_000)])
def test_a_matrix_is_the_same_in_whatever_portions_it_is_decoded(
    precision: Precision, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = stored(normal(*shape), precision)
    whole = part.matrix(torch.bfloat16)
    monkeypatch.setattr("stackwise.precision.stored._CHUNK", 2**14)
    assert torch.equal(part.matrix(torch.bfloat16), whole)


# --- products


@every_format
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_outputs_and_gradients_of_inputs_are_those_of_the_decoded_matrix(precision: Precision, compute: str) -> None:
    part, x, grad = stored(normal(40, 72), precision), normal(2, 5, 72).requires_grad_(), normal(2, 5, 40, seed=1)
    plain = part.plain()
    with autocast(CPU, compute):
        found, expected = part(x), plain(x)
    assert found.dtype == expected.dtype == DTYPES[compute]
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y, x, grad.to(y.dtype))[0] for y in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


@every_format
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_matrix_is_decoded_in_the_format_that_computes_and_not_kept(
    precision: Precision, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, x = stored(normal(64, 128), precision), normal(3, 128).requires_grad_()
    decode, dtypes, kept = part.decode, list[torch.dtype](), list[Tensor]()

    def counted(empty: Empty, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        dtypes.append(dtype)
        return decode(empty, dtype, *tensors)

    monkeypatch.setattr(part, "decode", counted)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(CPU, compute):
        y = part(x)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in part.stored()}
    y.float().sum().backward()
    assert x.grad is not None
    assert dtypes == [DTYPES[compute]] * 2
    assert all(p.grad is None and not p.requires_grad for p in part.parameters())


def test_compiled_a_graph_keeps_nothing_decoded_either() -> None:
    stack, kept = nn.Sequential(stored(normal(64, 128), "fp8"), nn.SiLU()), list[Tensor]()
    stack.compile(backend="aot_eager")
    x = normal(3, 128).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stack(x).sum().backward()
    assert sum(t.nbytes for t in kept) < 64 * 128 * 2
    assert x.grad is not None


@every_format
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_evaluation_leaves_gradients_outputs_and_state_as_they_were(precision: Precision, compute: str) -> None:
    """bitsandbytes repacks 4-bit weights when it evaluates, and rounds the inputs of 8-bit ones."""
    stack, x = build(precision=precision), normal(2, SEQ, D_MODEL)

    def gradient() -> Tensor:
        inputs = x.clone().requires_grad_()
        with autocast(CPU, compute):
            run(stack, inputs).square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    before, state, trained = gradient(), copy.deepcopy(stack.state_dict()), run(stack, x)
    stack.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), autocast(CPU, compute):
            run(stack, x)
        with mode():
            assert torch.equal(run(stack, x), trained)
    assert torch.equal(gradient(), before)
    stack.train()
    assert torch.equal(gradient(), before)
    assert before.abs().sum() > 0
    after = stack.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@every_format
def test_products_of_any_order_size_and_mode_share_memory_unharmed(precision: Precision) -> None:
    parts = [stored(normal(*shape, seed=i), precision) for i, shape in enumerate([(64, 32), (8, 64), (128, 8)])]
    x, plain = normal(3, 32).requires_grad_(), nn.Sequential(*(part.plain() for part in parts))

    def work() -> tuple[Tensor, Tensor]:
        model = nn.Sequential(*parts)
        with torch.inference_mode():
            model(x)
        with autocast(CPU, "bf16"):
            model(x)
        y = model(x)
        return y, torch.autograd.grad(y.sum(), x)[0]

    with ThreadPoolExecutor(1) as fresh:
        y, grad = fresh.submit(work).result()
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(x).sum(), x)[0], rtol=1e-5, atol=1e-5)


@every_format
def test_no_first_input_decides_the_format_of_later_ones(precision: Precision) -> None:
    part, x = stored(normal(16, 64), precision), normal(3, 64)
    expected = part(x)
    with autocast(CPU, "bf16"):
        part(x)
    part(x.bfloat16())
    assert torch.equal(part(x), expected)
    assert part(x[:0]).shape == (0, 16)  # of an expert without tokens


@every_format
def test_a_bias_is_taken_over_and_learns(precision: Precision) -> None:
    linear = nn.Linear(64, 16)
    holder = nn.Sequential(linear)
    formats.quantize(holder, precision)
    (part,) = holder
    assert isinstance(part, StoredLinear)
    assert part.bias is linear.bias
    x = normal(3, 64)
    y = part(x)
    torch.testing.assert_close(y, F.linear(x, part.matrix(torch.float32), linear.bias), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    assert torch.equal(linear.bias.grad if linear.bias.grad is not None else torch.empty(0), torch.full((16,), 3.0))
    with autocast(CPU, "bf16"):
        assert part(x).dtype == torch.bfloat16
    assert part.bias.dtype == torch.float32


@every_format
def test_a_format_survives_casts_copies_and_moves(precision: Precision) -> None:
    part, x = stored(normal(16, 64), precision), normal(3, 64)
    expected = part(x)
    for change in (nn.Module.half, nn.Module.double, lambda p: p.to("cpu", torch.bfloat16), copy.deepcopy):
        assert torch.equal(change(part)(x), expected)
    kinds = [(t.dtype, t.shape) for t in part.stored()]
    part.to("meta")  # of another device, as CUDA's are
    assert isinstance(part.weight, nn.Parameter)
    assert [(t.dtype, t.shape) for t in part.stored()] == kinds
    assert all(t.is_meta for t in part.stored())


# --- stacks


def test_every_architecture_is_among_those_tried() -> None:
    models = [model_of(name) for name in ARCHITECTURES]
    assert {m.attention.type for m in models} == set(ATTENTION)
    assert {m.mlp.type for m in models} == set(MLP)


@every_architecture
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_architecture_runs_forwards_and_backwards(architecture: str, precision: Precision) -> None:
    stack = build(architecture, precision).requires_grad_(False)
    x = normal(2, SEQ, D_MODEL)
    outputs = []
    for compute in ("fp32", "bf16"):
        inputs = x.clone().requires_grad_()
        with autocast(CPU, compute):
            y = run(stack, inputs)
        y.float().square().mean().backward()
        assert inputs.grad is not None
        assert inputs.grad.isfinite().all()
        assert inputs.grad.abs().amax(dim=-1).min() > 0
        outputs.append(y.detach().float())
    exact = run(build(architecture), x).detach()
    bound = {"nf4": 0.25, "fp4": 0.35, "nvfp4": 0.25, "fp8": 0.1}.get(precision, 0.05)
    if architecture == "moe":  # where a token may change its expert
        bound = 1.0
    for y in outputs:
        assert (y - exact).norm() / exact.norm() < bound


@each_kind_of_part
@every_format
def test_dequantized_a_stack_is_plain_and_computes_the_same(architecture: str, precision: Precision) -> None:
    stack, x = build(architecture, precision), normal(2, SEQ, D_MODEL)
    expected = run(stack, x)
    for part in stack.modules():
        if isinstance(part, FrozenLinear):
            part.bfloat16()  # as a trunk may have it
    formats.dequantize(stack)
    torch.testing.assert_close(run(stack, x), expected, rtol=1e-5, atol=1e-5)
    original = build(architecture)
    assert {name: type(part) for name, part in stack.named_modules()} == {
        name: type(part) for name, part in original.named_modules()
    }
    assert {name: p.dtype for name, p in stack.named_parameters()} == dict.fromkeys(
        dict(original.named_parameters()), torch.float32
    )


@pytest.mark.parametrize("precision", STORED)
def test_what_is_small_and_steers_much_keeps_more_bits(precision: Precision) -> None:
    for architecture, name in (("moe", "blocks.1.mlp.router"), ("timed", "blocks.1.modulation")):
        dtype = torch.float16 if precision == "half" else torch.bfloat16
        assert linears(build(architecture, precision))[name].weight.dtype == dtype
    timed, whole = build("timed", precision), build("timed")
    assert type(timed.get_submodule("time.hidden")) is nn.Linear
    for name, value in whole.time.state_dict().items() if whole.time else ():
        assert torch.equal(timed.state_dict()[f"time.{name}"], value)
    experts = linears(build("moe", precision))
    assert type(experts["blocks.0.mlp.experts.2.up_proj"]) is type(experts["blocks.0.attention.q_proj"])
    frozen = build("frozen-up", precision)
    assert isinstance(frozen.get_submodule("blocks.0.mlp.up_proj"), FrozenLinear)


# --- sizes


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(64, 128), (50, 38), (7, 5), (1, 1), (257, 300), (512, 96)])
def test_bytes_of_a_matrix_are_those_that_it_takes(precision: Precision, shape: tuple[int, int]) -> None:
    tensors = (normal(*shape),) if precision == "full" else stored(normal(*shape), precision).stored()
    assert matrix_bytes(*shape, precision) == sum(t.nbytes for t in tensors)


@each_kind_of_part
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_of_a_stack_are_the_sum_of_its_matrices(architecture: str, precision: Precision, tmp_path: Path) -> None:
    whole = build(architecture)
    expected = 0
    for name, p in whole.named_parameters():
        path = name.rpartition(".")[0]
        if p.ndim == 2:
            expected += matrix_bytes(p.shape[0], p.shape[1], matrix_precision(path, precision))
        else:
            expected += 4 * p.numel()
    stack = build(architecture, precision)
    assert formats.memory(stack) == expected
    formats.save(stack, tmp_path / "stack")
    on_disk = sum(t.nbytes for t in load_file(tmp_path / "stack").values())
    # Means of scales and settings of nf4 and fp4 lie there as text; flags, seeds.
    assert abs(on_disk - expected) < 160 * len(linears(stack)) + 100


def test_tables_of_embeddings_have_16_bits_at_least() -> None:
    found = {precision: at_least_16_bits(precision) for precision in PRECISIONS}
    assert found == {**dict.fromkeys(PRECISIONS, "bfloat16"), "full": "full", "half": "half"}


def test_imports_are_as_light_as_they_can_be() -> None:
    code = (
        "import sys, stackwise.precision.sizes; assert 'torch' not in sys.modules;"
        "import stackwise.precision.trunk; assert not {'bitsandbytes', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- files


@each_kind_of_part
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loaded_stack_is_the_saved_one_bit_for_bit(architecture: str, precision: Precision, tmp_path: Path) -> None:
    stack, x = build(architecture, precision), normal(2, SEQ, D_MODEL)
    formats.save(stack, tmp_path / "first")
    with torch.device("meta"):
        loaded = Stack(model_of(architecture), 2)
    formats.load(loaded, tmp_path / "first", precision, CPU)
    state, found = stack.state_dict(), loaded.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(run(loaded, x), run(stack, x))
    formats.save(loaded, tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()
    assert formats.memory(loaded) == formats.memory(stack)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_loaded_weights_are_the_file_itself(precision: Precision, tmp_path: Path) -> None:
    """No weight is ever in memory a second time, in whatever format."""
    formats.save(build(precision=precision), tmp_path / "stack")
    with torch.device("meta"):
        loaded = Stack(model_of(), 2)
    formats.load(loaded, tmp_path / "stack", precision, CPU)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        [int(end, 16) for end in fields[0].split("-")] for fields in maps if fields[-1] == str(tmp_path / "stack")
    ]
    for part in loaded.modules():
        tensors = part.stored() if isinstance(part, StoredLinear) else part.parameters(recurse=False)
        for tensor in tensors:
            if tensor.ndim:  # the mean of 4-bit scales is read from text
                assert any(begin <= tensor.data_ptr() < end for begin, end in mapped)


@every_format
def test_missing_tensors_are_found(precision: Precision, tmp_path: Path) -> None:
    formats.save(build(precision=precision), tmp_path / "stack")
    weights = load_file(tmp_path / "stack")
    del weights["blocks.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "stack")
    with torch.device("meta"):
        loaded = Stack(model_of(), 2)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.down_proj"):
        formats.load(loaded, tmp_path / "stack", precision, CPU)


@every_format
def test_equal_weights_make_equal_bytes(precision: Precision, tmp_path: Path) -> None:
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        formats.save(build(precision=precision), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


# --- the trunk


def train(
    directory: Path, model: ModelParams | str = "standard", *, change: Callable[[Stack], None] | None = None
) -> TrainedStack:
    """A stack 0 that has learned nothing yet, with embeddings."""
    shape = RackShape.of(model_of(model) if isinstance(model, str) else model, [2], VOCAB)
    stack, embeddings = build(shape.stack_model(0)), shape.build_embeddings()
    initialize(embeddings, name="embeddings", seed=0)
    if change is not None:
        change(stack)
    with manifest.publish(directory, kind=KIND, params={}) as draft:
        save_file(stack.state_dict(), draft.directory / stack_file(0))
        save_file(embeddings.state_dict(), draft.directory / EMBEDDINGS)
        draft.facts |= {"stacks": [0], "adapters": {}, "embeddings": True, "shape": shape.to_json()}
    return Training(manifest.read(directory, KIND)).stack(0)


def trunk_of(stack: TrainedStack, directory: Path, precision: Precision) -> TrunkStack:
    with manifest.publish(directory, kind="trunk", params={}) as draft:
        draft.facts |= quantize_stack(stack, draft.directory, precision)
    return TrunkStack(manifest.read(directory, "trunk"))


@each_kind_of_part
@pytest.mark.parametrize("precision", PRECISIONS)
def test_facts_of_a_trunk_stack_are_true(architecture: str, precision: Precision, tmp_path: Path) -> None:
    source = train(tmp_path / "stack", architecture)
    trunk = trunk_of(source, tmp_path / "trunk", precision)
    facts = trunk.artifact.facts
    assert (trunk.index, trunk.precision, trunk.shape, trunk.digest) == (
        0,
        precision,
        source.shape,
        trunk.artifact.digest,
    )
    stack = trunk.load_stack("fp32", CPU)
    assert facts["bytes"] == formats.memory(stack)
    formats.dequantize(stack)
    found = {**stack.state_dict(), **trunk.load_embeddings(CPU).state_dict()}
    whole = {**source.load_stack().state_dict(), **source.load_embeddings().state_dict()}
    weights = [name for name, weight in whole.items() if weight.is_floating_point()]
    changed = sum(float((found[name].double() - whole[name].double()).square().sum()) for name in weights)
    total = sum(float(whole[name].double().square().sum()) for name in weights)
    assert facts["relative_error"] == pytest.approx((changed / total) ** 0.5, rel=1e-6)
    assert (facts["relative_error"] == 0) == (precision == "full")


def test_a_trunk_stack_has_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    model = model_of().model_copy(update={"mlp": MLPParams(hidden=70_000)})  # large enough to be shared among threads
    source, digests = train(tmp_path / "stack", model), set()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        digests.add(trunk_of(source, tmp_path / str(threads), "nf4").digest)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert len(digests) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_embeddings_of_a_trunk_have_16_bits_on_disk_and_32_in_memory(precision: Precision, tmp_path: Path) -> None:
    source = train(tmp_path / "stack")
    trunk = trunk_of(source, tmp_path / "trunk", precision)
    dtype = {"full": torch.float32, "half": torch.float16}.get(precision, torch.bfloat16)
    on_disk = load_file(trunk.artifact.path / "embeddings.safetensors")
    embeddings = trunk.load_embeddings(CPU)
    assert not any(p.requires_grad for p in embeddings.parameters())
    for name, value in source.load_embeddings().state_dict().items():
        assert on_disk[name].dtype == dtype
        assert torch.equal(embeddings.state_dict()[name], value.to(dtype).float())


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ["timed", "frozen-up", "moe"])
def test_a_trunk_stack_is_frozen_and_holds_no_more_than_computes(
    architecture: str, precision: Precision, compute: str, tmp_path: Path
) -> None:
    trunk = trunk_of(train(tmp_path / "stack", architecture), tmp_path / "trunk", precision)
    stack, x = trunk.load_stack(compute, CPU), normal(2, SEQ, D_MODEL).requires_grad_()
    assert not stack.training
    assert not any(p.requires_grad for p in stack.parameters())
    q_proj = linears(stack)["blocks.0.attention.q_proj"]
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "full" and compute == "fp32":
        assert type(q_proj) is nn.Linear
    elif precision in ("full", "half", "bfloat16"):
        stored_in = torch.float16 if precision == "half" else torch.bfloat16
        assert q_proj.weight.dtype == narrow.get(compute, stored_in)
    else:
        assert formats.memory(stack) == trunk.artifact.facts["bytes"]
    for part in stack.modules():
        if isinstance(part, FrozenLinear):
            assert part.value.dtype == DTYPES[compute]
    with autocast(CPU, compute):
        y = run(stack, x)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.isfinite().all()


def test_rounding_as_it_is_loaded_is_rounding_for_each_product(tmp_path: Path) -> None:
    trunk, x = trunk_of(train(tmp_path / "stack"), tmp_path / "trunk", "full"), normal(2, SEQ, D_MODEL)
    with autocast(CPU, "bf16"):
        rounded = run(trunk.load_stack("bf16", CPU), x)
        assert torch.equal(rounded, run(trunk.load_stack("fp32", CPU), x))
    assert not torch.equal(rounded, run(trunk.load_stack("fp32", CPU), x))


# --- what is refused


@pytest.mark.parametrize(("precision", "weight"), [("half", 1e5), ("int8", 1e5), ("bfloat16", float("nan"))])
def test_weights_that_a_format_cannot_hold_are_refused(precision: Precision, weight: float, tmp_path: Path) -> None:
    def change(stack: Stack) -> None:
        q_proj: Any = stack.get_submodule("blocks.1.attention.q_proj")
        q_proj.weight.data[3, 4] = weight

    with pytest.raises(UserError) as error:
        trunk_of(train(tmp_path / "stack", change=change), tmp_path / "trunk", precision)
    assert str(error.value) == (
        f"params.yaml: trunk.precision = {precision}: cannot hold the weights of stack 0 ({tmp_path / 'stack'}), some "
        "of which are too large or not finite; set it, or trunk.precisions.0, to bfloat16 or full, and check that the "
        "training has not diverged"
    )
    assert not (tmp_path / "trunk").exists()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_device_that_cannot_is_refused(precision: Precision, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        formats.check_precision(precision, torch.device(device))
    if precision in ("full", "half", "bfloat16"):
        formats.check_precision(precision, torch.device("mps"))
        return
    trunk = trunk_of(train(tmp_path / "stack"), tmp_path / "trunk", precision)
    with pytest.raises(UserError) as error:
        trunk.load_stack("fp32", torch.device("mps"))
    assert str(error.value) == (
        f"params.yaml: trunk.precision = {precision}: does not work on mps; set compute.device to cpu or cuda, or set "
        "it (and trunk.precisions) to bfloat16, half or full"
    )


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_a_machine_without_bitsandbytes_is_told(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary

    source = train(tmp_path / "stack")
    with monkeypatch.context() as patch:
        patch.setattr("bitsandbytes.cextension.lib", ErrorHandlerMockBNBNativeLibrary("no such library"))
        with pytest.raises(UserError, match=f"precision = {precision}: needs .* library does not load"):
            quantize_stack(source, tmp_path, precision)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"precision = {precision}: needs .* not installed; install what requirements"):
        quantize_stack(source, tmp_path, precision)
    assert formats.check_precision("fp8", CPU) is None  # type: ignore[func-returns-value]
