"""Bytes of matrices in the formats of a trunk, and which matrix has which. Light on purpose: it imports no torch."""

from stackwise.config.compute import Precision

NVFP4_GROUP = 16
"""Neighbours in a row that share a scale in nvfp4."""
FOUR_BIT_BLOCK = 64
"""Neighbours in a matrix that share a scale in nf4 and fp4."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own in nf4 and fp4 (Dettmers et al. 2023, QLoRA, double quantization)."""
_CODE_TABLES = 4 * (16 + 256 + 1)
"""The values of the 4-bit codes and of the 8-bit scales, and the mean scale, fp32."""


def matrix_bytes(rows: int, columns: int, precision: Precision) -> int:
    """What one matrix `[rows, columns]` takes in memory, with its scales and code tables (bytes)."""
    numbers = rows * columns
    match precision:
        case "full":
            return 4 * numbers
        case "half" | "bfloat16":
            return 2 * numbers
        case "int8" | "fp8":  # an fp32 scale for each row
            return numbers + 4 * rows
        case "nvfp4":  # a byte holds two codes; an e4m3 scale for each group, one in fp32 for all
            groups = _divided_up(columns, NVFP4_GROUP)
            return rows * groups * (NVFP4_GROUP // 2 + 1) + 4
        case "nf4" | "fp4":
            blocks = _divided_up(numbers, FOUR_BIT_BLOCK)
            return _divided_up(numbers, 2) + blocks + 4 * _divided_up(blocks, NESTED_BLOCK) + _CODE_TABLES


def matrix_precision(name: str, precision: Precision) -> Precision:
    """The format of the matrix called `name` in a stack whose format is `precision`.

    Everything that maps the residual stream has the stack's own. What is small and steers much keeps more: routers,
    whose rounding would send tokens to other experts, and the modulations by time have 16 bits at least; the embedding
    of time, two matrices a stack, is fp32 in every format.

    Args:
        name: path of the module in the stack, such as `blocks.0.mlp.down_proj`.
        precision: of the stack.
    """
    path = name.split(".")
    if path[0] == "time":
        return "full"
    return at_least_16_bits(precision) if path[-1] in ("router", "modulation") else precision


def at_least_16_bits(precision: Precision) -> Precision:
    """The format of what stays at 16 bits in a stack of fewer, the tables of embeddings among it: bfloat16."""
    return precision if precision in ("full", "half") else "bfloat16"


def _divided_up(n: int, size: int) -> int:
    return -(-n // size)
