"""Gradients written by hand, of the norm, the rotation and the gate: against finite differences and PyTorch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.config.model import MLPParams, ModelParams
from stackwise.mlp.swiglu import SwiGLU
from stackwise.model.norm import RMSNorm
from stackwise.model.rope import Rope, rotary_table, rotate

CPU = torch.device("cpu")
EPS = 1e-3
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_of(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), EPS).to(weight.dtype)
    norm.load_state_dict({"weight": weight})
    return norm


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value of a function and the gradients of its inputs for a random one of the output."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    value = function(*inputs)
    gradients = torch.autograd.grad(value, inputs, drawn(*value.shape, dtype=value.dtype, seed=9))
    return [value.detach(), *gradients]


# --- RMSNorm


def test_gradient_of_the_norm() -> None:
    norm, x = norm_of(drawn(6, seed=1)), drawn(2, 3, 6).requires_grad_()

    def by_weight(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(by_weight, (x, norm.weight))
    assert torch.autograd.gradcheck(by_weight, (x.detach().transpose(0, 1).requires_grad_(), norm.weight))
    norm.requires_grad_(False)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_pytorch(dtype: torch.dtype, weights: torch.dtype) -> None:
    """Whatever the formats: the result is exact up to the rounding of the last step."""
    x, weight = drawn(4, 5, 16, dtype=dtype), drawn(16, dtype=weights, seed=1)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm_of(weight.detach()), {"weight": weight}, (x,))

    found = value_and_gradients(ours, x, weight)
    expected = value_and_gradients(lambda x, w: F.rms_norm(x, (16,), w, EPS), x.double(), weight.double())
    assert [part.dtype for part in found] == [dtype, dtype, weights]
    if dtype == torch.bfloat16:
        assert torch.equal(found[0], expected[0].to(dtype))  # rounded once
    tolerance = 1e-2 if torch.bfloat16 in (dtype, weights) else 1e-6 if torch.float32 in (dtype, weights) else 1e-12
    for part, reference in zip(found, expected, strict=True):
        assert (part.double() - reference).norm() < tolerance * reference.norm()


def test_norm_keeps_its_input_and_nothing_of_that_size_besides() -> None:
    norm, x = norm_of(torch.ones(64)), drawn(8, 64, dtype=torch.float32).requires_grad_()
    saved: list[Tensor] = []

    def note(part: Tensor) -> Tensor:
        saved.append(part)
        return part

    with torch.autograd.graph.saved_tensors_hooks(note, lambda part: part):
        norm(x)
    assert [part.data_ptr() for part in saved if part.numel() == x.numel()] == [x.data_ptr()]


# --- rotation


def test_gradient_of_the_rotation() -> None:
    scaled = Rope(theta=100.0, scaling="yarn", factor=4.0, original_len=8)
    for rope in (Rope(theta=100.0), scaled):
        cos, sin = (part.double() for part in rotary_table(3, 5, 6, rope, CPU))
        for x in (drawn(2, 2, 5, 6), drawn(2, 5, 2, 6).transpose(1, 2)):
            assert torch.autograd.gradcheck(lambda x, c=cos, s=sin: rotate(x, c, s), (x.requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_turns_pairs_as_complex_numbers(dtype: torch.dtype) -> None:
    x = drawn(2, 3, 5, 8, dtype=dtype)
    angles = torch.outer(torch.arange(3, 8).double(), Rope(theta=100.0).frequencies(8, CPU).double())

    def reference(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    found = value_and_gradients(lambda x: rotate(x, *rotary_table(3, 5, 8, Rope(theta=100.0), CPU)), x)
    expected = value_and_gradients(reference, x.double())
    for part, exact in zip(found, expected, strict=True):
        assert part.dtype == dtype
        assert (part.double() - exact).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-6) * exact.norm()


# --- gate


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """What a SwiGLU whose three projections are identities computes of `gate` and `up` side by side."""
    width = gate.shape[-1]
    mlp = SwiGLU(ModelParams(d_model=2 * width, mlp=MLPParams(hidden=width))).to(gate.dtype)
    eye = torch.eye(2 * width, dtype=gate.dtype)
    projections = {
        "gate_proj.weight": eye[:width],
        "up_proj.weight": eye[width:],
        "down_proj.weight": eye[:, :width],
    }
    return torch.func.functional_call(mlp, projections, (torch.cat((gate, up), dim=-1),))[..., :width]


def test_gradient_of_the_gate() -> None:
    assert torch.autograd.gradcheck(gated, (drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4, seed=1).requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_is_that_of_pytorch(dtype: torch.dtype) -> None:
    gate, up = drawn(2, 3, 8, dtype=dtype), drawn(2, 3, 8, dtype=dtype, seed=1)
    found = value_and_gradients(gated, gate, up)
    expected = value_and_gradients(lambda gate, up: F.silu(gate) * up, gate.double(), up.double())
    for part, exact in zip(found, expected, strict=True):
        assert part.dtype == dtype
        assert (part.double() - exact).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-6) * exact.norm()


# --- all of them


@pytest.mark.filterwarnings("ignore")  # of the tracer, about modules of its own
def test_they_compile() -> None:
    """The compiler sees through gradients that are written by hand."""
    norm, mlp = norm_of(drawn(8, seed=1)), SwiGLU(ModelParams(d_model=8, mlp=MLPParams(hidden=6))).double()
    cos, sin = rotary_table(0, 5, 8, Rope(), CPU)

    def layer(x: Tensor) -> Tensor:
        return mlp(rotate(norm(x), cos, sin))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for found, expected in zip(*(value_and_gradients(f, drawn(2, 5, 8)) for f in (compiled, layer)), strict=True):
        torch.testing.assert_close(found, expected)
