"""Operations that several modules share, on a `Tape`."""

from stackwise.plan.parts import Projection
from stackwise.plan.tape import FP32, Gradients, Tape, Tensor, Weight


def project(tape: Tape, x: Tensor, projection: Projection) -> Tensor:
    """A linear map; its adapters are PEFT's (`peft.tuners.lora.Linear`), which have their inputs in fp32."""
    out = tape.linear(x, projection.weight, projection.bias)
    exact = tape.cast(x, FP32) if projection.adapters else x
    for a, b, drops in projection.adapters:
        inner = dropout(tape, exact) if drops else exact
        out = tape.add(out, tape.map(tape.linear(tape.linear(inner, a), b)))
        del inner
    return out


def dropout(tape: Tape, x: Tensor) -> Tensor:
    """Its mask is kept: on CPUs in the format of `x`."""
    mask = tape.new(x.size, x.width if tape.device == "cpu" else 1)
    size, width = x.size, x.width
    return tape.record(tape.new(size, width), [x], lambda gradients: [tape.new(size, width)], [mask.storage])


def norm(tape: Tape, x: Tensor, weight: Weight) -> Tensor:
    """`stackwise.model.norm.RMSNorm`: PyTorch's kernel on CUDA where no formats mix, its own chain elsewhere."""
    size, width, d = x.size, x.width, weight.size
    fused, learns = tape.device == "cuda" and width == weight.width, tape.wants(weight)
    scale = tape.new(size // d, FP32)

    def backward(gradients: list[Tensor]) -> Gradients:
        if fused:
            return [tape.new(size, width), tape.new(d, FP32) if learns else None]
        normed, products = tape.new(size, FP32), tape.new(size, FP32)
        of_weight = tape.new(d, FP32) if learns else None
        exact = tape.new(size, FP32) if width < FP32 else None
        del exact, products
        return [normed if width == FP32 else tape.new(size, width), of_weight]

    out = tape.new(size, width if fused else FP32)
    if out.width != width:
        out = tape.new(size, width)
    return tape.record(out, [x, weight], backward, [x.storage, scale.storage])


def rotate(tape: Tape, x: Tensor, angles: int) -> Tensor:
    """`stackwise.model.rope.rotate`, by so many cosines and as many sines, of which narrow formats keep a copy."""
    size, width = x.size, x.width
    table = tape.new(2 * angles, width).storage if width < FP32 else None
    return tape.record(tape.new(size, width), [x], lambda gradients: [tape.new(size, width)], [table])
