"""How many bytes cached activations take on disk: plain arithmetic, for the store itself and for whoever plans ahead.

Nothing here knows torch or Zarr.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

StoreDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3fn"]

CRC_BYTES = 4
_INDEX_ENTRY_BYTES = 16  # offset and length, both uint64
_BATCH_ROWS = 32
_BATCH_NUMBERS = 2**22


@dataclass(frozen=True)
class Format:
    """How a token of a boundary lies on disk: the codes of its channels, then the scales that some of them share."""

    element: str
    """Numpy dtype of the array on disk; single bytes where there are scales."""
    code_bytes: int
    scale_bytes: int = 0
    """Bytes of a scale (0: there are none)."""
    group: int | None = None
    """Channels that share a scale; the last group of a token may have fewer (None: all channels do)."""

    def channels_per_scale(self, d_model: int) -> int:
        """Channels that share a scale."""
        return min(self.group or d_model, d_model)

    def token_bytes(self, d_model: int) -> int:
        """Bytes of the codes and scales of a token."""
        return d_model * self.code_bytes + -(-d_model // self.channels_per_scale(d_model)) * self.scale_bytes


FORMATS: dict[StoreDtype, Format] = {
    "float32": Format("float32", 4),
    "bfloat16": Format("uint16", 2),
    "int8": Format("uint8", 1, scale_bytes=2, group=64),
    "float8_e4m3fn": Format("uint8", 1, scale_bytes=4),
}
"""The format of each dtype that a store may have."""
DTYPES: dict[str, StoreDtype] = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
"""The dtype of each value of `trunk.activations`."""


def row_bytes(seq: int, d_model: int, activations: str) -> int:
    """Bytes of one row, the `[seq, d_model]` of one masked sample, without its checksum.

    Args:
        seq: positions.
        d_model: channels of a position.
        activations: value of `trunk.activations`.
    """
    return seq * FORMATS[DTYPES[activations]].token_bytes(d_model)


def index_bytes(shard_rows: int) -> int:
    """Bytes of the index at the end of every shard: one entry a row, present or not, and a checksum."""
    return shard_rows * _INDEX_ENTRY_BYTES + CRC_BYTES


def rows_per_shard(row_bytes: int, shard_bytes: int = 16 * 2**20) -> int:
    """Number of rows, at least 1, that makes a shard of at most about `shard_bytes`.

    Args:
        row_bytes: size of one row in bytes.
        shard_bytes: wanted size of a shard file in bytes. Bigger shards mean fewer files, smaller ones less
            work that is repeated after a crash.

    Raises:
        ValueError: a size is not positive.
    """
    if row_bytes < 1 or shard_bytes < 1:
        raise ValueError(f"sizes must be positive, not row_bytes={row_bytes}, shard_bytes={shard_bytes}")
    return max(1, shard_bytes // row_bytes)


def rows_per_batch(seq: int, d_model: int) -> int:
    """Rows of a boundary that are computed at a time: a power of two, at most 32, of about four million numbers."""
    rows = _BATCH_ROWS
    while rows > 1 and rows * seq * d_model > _BATCH_NUMBERS:
        rows //= 2
    return rows


def boundary_shard_rows(seq: int, d_model: int, activations: str, shard_mb: int) -> int:
    """Rows of a shard of a boundary, in whole batches.

    So a row is always computed among the same others, whatever the size of a shard, which keeps its bits the same.
    """
    batch = rows_per_batch(seq, d_model)
    return max(1, rows_per_shard(row_bytes(seq, d_model, activations), shard_mb * 2**20) // batch) * batch


def shards_of(variants: Iterable[int], samples: int, shard_rows: int) -> set[int]:
    """Numbers of the shards that hold rows of some mask variants; those of variant v begin with row v * samples."""
    return {g for v in variants for g in range(v * samples // shard_rows, ((v + 1) * samples - 1) // shard_rows + 1)}


def rows_made(rows: int, shard_rows: int, *, variants: int, at_once: int, passes: int) -> tuple[int, int]:
    """Rows of a boundary that are computed when it is cached, and once more while a training visits its mask variants
    in turn; more than none of the latter where not all are on disk at once.

    Args:
        rows: samples times mask variants.
        shard_rows: rows of a shard, which is made whole.
        variants: mask variants of each sample.
        at_once: how many are on disk at the same time; another takes the place of the least recently visited.
        passes: of the training over the samples, each under the next variant.
    """
    held, again = list(range(min(at_once, variants))), 0

    def shards() -> set[int]:
        return shards_of(held, rows // variants, shard_rows)

    def size(made: Iterable[int]) -> int:
        return sum(min(rows, (g + 1) * shard_rows) - g * shard_rows for g in made)

    first = size(shards())
    for variant in (p % variants for p in range(passes)):
        before, known = shards(), variant in held
        held = [*(v for v in held if v != variant), variant][-at_once:]
        if not known:
            again += size(shards() - before)
    return first, again


def boundary_bytes(
    rows: int,
    seq: int,
    d_model: int,
    activations: str,
    shard_mb: int,
    *,
    variants: int = 1,
    at_once: int | None = None,
) -> int:
    """Most bytes that the shards of a boundary take on disk at the same time, with their checksums and indexes.

    Exactly what the files add up to; the metadata, one file of about 1 kB, is not counted.

    Args:
        rows: samples times mask variants.
        seq: positions of a row.
        d_model: channels of a position.
        activations: value of `trunk.activations`.
        shard_mb: `activations.shard_mb`.
        variants: mask variants of each sample.
        at_once: `activations.time_steps_at_once`; the variants are visited in turn.
    """
    shard_rows, held = boundary_shard_rows(seq, d_model, activations, shard_mb), min(at_once or variants, variants)
    row, last = row_bytes(seq, d_model, activations) + CRC_BYTES, -(-rows // shard_rows) - 1

    def bytes_of(shards: Collection[int]) -> int:
        """Of some shards, of which the last of all may be shorter."""
        missing = (last + 1) * shard_rows - rows if last in shards else 0
        return (len(shards) * shard_rows - missing) * row + len(shards) * index_bytes(shard_rows)

    if held == variants:
        return bytes_of(range(last + 1))
    # While the variants first, first + 1, ... are there; after the last comes the first again.
    visits = ([(first + i) % variants for i in range(held)] for first in range(variants))
    return max(bytes_of(shards_of(visited, rows // variants, shard_rows)) for visited in visits)
