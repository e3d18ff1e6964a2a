"""The formats of a trunk: making them of a stack's matrices, undoing them, saving and loading."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stackwise.config.compute import Precision
from stackwise.errors import UserError
from stackwise.model.frozen import FrozenRandom
from stackwise.model.time import Modulation
from stackwise.precision.fp8 import Fp8Linear
from stackwise.precision.nvfp4 import Nvfp4Linear
from stackwise.precision.rounded import RoundedLinear, RoundedModulation
from stackwise.precision.sizes import matrix_precision
from stackwise.precision.stored import StoredLinear

_BY_BITSANDBYTES = ("int8", "fp4", "nf4")


def check_precision(precision: Precision, device: torch.device, *, key: str = "trunk.precision") -> None:
    """Make sure that this machine can compute on `device` with matrices in a format.

    Args:
        precision: the format.
        device: that computes.
        key: the parameter that names the format, for messages.

    Raises:
        UserError: it cannot.
    """
    if precision in ("full", "half", "bfloat16"):
        return
    if device.type not in ("cpu", "cuda"):
        problem = f"does not work on {device.type}; set compute.device to cpu or cuda"
    elif precision in _BY_BITSANDBYTES and (lacking := _lacking_of_bitsandbytes()):
        problem = f"needs the package bitsandbytes, {lacking}"
    else:
        return
    others = (
        "it (and trunk.precisions) to bfloat16, half or full" if key == "trunk.precision" else "it to bfloat16 or half"
    )
    raise UserError(f"params.yaml: {key} = {precision}: {problem}, or set {others}")


def quantize(stack: nn.Module, precision: Precision) -> None:
    """Put a stack's matrices into a format, in place: every `nn.Linear` becomes a `StoredLinear`.

    What `matrix_precision` leaves in fp32, vectors, and what is drawn from seeds stay as they are. Biases are taken
    over, not copied.
    """
    for name, linear in _linears(stack):
        if stored := _empty(linear, matrix_precision(name, precision)):
            stored.take(linear.weight)
            stored.bias = linear.bias
            _replace(stack, name, stored.train(linear.training))


def dequantize(module: nn.Module) -> None:
    """Put what the stored matrices mean into plain modules in fp32, in place.

    `module` may be a stack, or one with adapters around its projections, which can then be merged. Features that are
    drawn from seeds are drawn in fp32 again.
    """
    for name, part in list(module.named_modules()):
        if isinstance(part, StoredLinear):
            _replace(module, name, part.plain())
        elif isinstance(part, FrozenRandom) and part.value.dtype != torch.float32:
            part.float().reseed(int(part.seed))


def save(module: nn.Module, file: Path) -> None:
    """Write all weights, as they are stored, in the format safetensors."""
    save_file(module.state_dict(), file)


def load(
    module: nn.Module, file: Path, precision: Precision, device: torch.device, *, held: Precision | None = None
) -> None:
    """Load a stack that `save` wrote onto one that was built on the meta device.

    On a CPU the weights are the file itself, mapped into memory. Elsewhere, and where they are rounded, they are read
    one by one.

    Args:
        module: gets the weights, and the format.
        file: in safetensors.
        precision: the format of the file.
        device: where the weights go.
        held: the format in memory, if both have 16 or 32 bits; the file's own if None.
    """
    held = held or precision
    for name, linear in _linears(module):
        if stored := _empty(linear, matrix_precision(name, held)):
            _replace(module, name, stored)
    here, weights = module.state_dict(), {}
    mapped = device.type == "cpu" and held == precision
    with safe_open(file, framework="pt", backend="mmap" if mapped else "pread") as f:
        for name in f.keys():  # noqa: SIM118 (it is no mapping)
            weights[name] = f.get_tensor(name).to(device, None if held == precision else here[name].dtype)
    module.load_state_dict(weights, assign=True)


def memory(module: nn.Module) -> int:
    """What the weights take, with scales and code tables, without what is drawn from seeds (bytes)."""
    return sum(tensor.nbytes for part in module.modules() for tensor in _weights(part))


def _weights(part: nn.Module) -> Iterator[Tensor]:
    """A module's own."""
    if isinstance(part, StoredLinear):
        yield from part.stored()
    for name, parameter in part.named_parameters(recurse=False):
        if not (isinstance(part, StoredLinear) and name == "weight"):
            yield parameter


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """All that may be replaced, with their names; those that have been are not kept alive."""
    named = module.named_modules()
    for name in [name for name, m in named if isinstance(m, nn.Linear) and not isinstance(m, StoredLinear)]:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield name, linear


def _empty(linear: nn.Linear, precision: Precision) -> StoredLinear | None:
    """A module of a format for the matrix of `linear`, on the meta device; None if that is to stay."""
    widths = linear.in_features, linear.out_features
    bias = linear.bias is not None
    with torch.device("meta"):
        match precision:
            case "full":
                return None
            case "half" | "bfloat16":
                dtype = torch.float16 if precision == "half" else torch.bfloat16
                if isinstance(linear, Modulation):
                    return RoundedModulation(linear.in_features, linear.out_features // 6, dtype)
                return RoundedLinear(*widths, bias, dtype)
            case "fp8":
                return Fp8Linear(*widths, bias)
            case "nvfp4":
                return Nvfp4Linear(*widths, bias)
            case "int8":
                from stackwise.precision.bits_and_bytes import EightBitLinear

                return EightBitLinear(*widths, bias)
            case "nf4" | "fp4":
                from stackwise.precision.bits_and_bytes import FourBitLinear

                return FourBitLinear(*widths, bias, precision)


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)


def _lacking_of_bitsandbytes() -> str | None:
    """What keeps this machine from using it."""
    if find_spec("bitsandbytes") is None:
        return "which is not installed; install what requirements.lock lists"
    from stackwise.precision.bits_and_bytes import has_native_library

    if not has_native_library():
        return "whose native library does not load; do what `python -m bitsandbytes` says"
    return None
